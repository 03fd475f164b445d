"""Features against features: `(student [..., D], teacher [..., D]) -> [...]`.

A distance with a parameter `mask` compares positions (rows) with each other; one marked `any_width` needs
no projection. Each row's value is such that the mean over the rows that count is the published loss.
"""

from kdloss.distances.attention_mse import attention_mse
from kdloss.distances.attention_transfer import attention_transfer
from kdloss.distances.between import between_examples, between_tokens, tokens
from kdloss.distances.cka import cka
from kdloss.distances.cosine import cosine
from kdloss.distances.layer_norm_mse import layer_norm_mse
from kdloss.distances.minilm import minilm
from kdloss.distances.minilm_v2 import minilm_v2
from kdloss.distances.mse import mse
from kdloss.distances.normalized_mse import normalized_mse
from kdloss.distances.similarity import similarity

__all__ = [
    "attention_mse",
    "attention_transfer",
    "between_examples",
    "between_tokens",
    "cka",
    "cosine",
    "layer_norm_mse",
    "minilm",
    "minilm_v2",
    "mse",
    "normalized_mse",
    "similarity",
    "tokens",
]
