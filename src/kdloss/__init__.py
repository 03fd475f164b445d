"""Knowledge-distillation losses that drop into a training loop you already have."""

from kdloss.analysis import CKAMatrix, cka_matrix
from kdloss.capture import Captured, capture
from kdloss.criteria import FeatureKD, MultiTeacherKD, VanillaKD
from kdloss.cross_entropy import cross_entropy
from kdloss.distances import (
    attention_transfer,
    between_examples,
    between_tokens,
    cka,
    cosine,
    layer_norm_mse,
    mse,
    normalized_mse,
    similarity,
    tokens,
)
from kdloss.distiller import Distilled, Distiller
from kdloss.divergences import (
    adaptive_kl,
    bernoulli_kl,
    dist,
    dkd,
    forward_kl,
    jsd,
    logit_mse,
    nkd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    standardized,
    symmetric_kl,
    total_variation,
    uld,
)
from kdloss.layers import (
    find_blocks,
    pair,
    pair_by_attention,
    pair_by_emd,
    pair_by_resolution,
    select,
)
from kdloss.projection import conv1x1, linear, mlp
from kdloss.reduction import masked, reduce
from kdloss.resize import interpolate, pool
from kdloss.students import keep_blocks
from kdloss.targets import LazyLogits, Mixture, ShardedLogits, TokenMap, TopKLogits, truncate

__all__ = [
    "CKAMatrix",
    "Captured",
    "Distilled",
    "Distiller",
    "FeatureKD",
    "LazyLogits",
    "Mixture",
    "MultiTeacherKD",
    "ShardedLogits",
    "TokenMap",
    "TopKLogits",
    "VanillaKD",
    "adaptive_kl",
    "attention_transfer",
    "bernoulli_kl",
    "between_examples",
    "between_tokens",
    "capture",
    "cka",
    "cka_matrix",
    "conv1x1",
    "cosine",
    "cross_entropy",
    "dist",
    "dkd",
    "find_blocks",
    "forward_kl",
    "interpolate",
    "jsd",
    "keep_blocks",
    "layer_norm_mse",
    "linear",
    "logit_mse",
    "masked",
    "mlp",
    "mse",
    "nkd",
    "normalized_mse",
    "pair",
    "pair_by_attention",
    "pair_by_emd",
    "pair_by_resolution",
    "pool",
    "reduce",
    "reverse_kl",
    "select",
    "similarity",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "standardized",
    "symmetric_kl",
    "tokens",
    "total_variation",
    "truncate",
    "uld",
]
