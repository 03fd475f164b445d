"""Knowledge-distillation losses that drop into a training loop you already have."""

from kdloss import analysis, distances, divergences, layers, projections, resize, schedules, targets
from kdloss._capture import Captured, capture
from kdloss._cross_entropy import cross_entropy
from kdloss.criteria import FeatureKD, MultiTeacherKD, VanillaKD
from kdloss.distiller import Distilled, Distiller
from kdloss.reduction import masked, reduce
from kdloss.students import keep_blocks
from kdloss.targets import LazyLogits, Mixture, ShardedLogits, TokenMap, TopKLogits, truncate

__all__ = [
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
    "analysis",
    "capture",
    "cross_entropy",
    "distances",
    "divergences",
    "keep_blocks",
    "layers",
    "masked",
    "projections",
    "reduce",
    "resize",
    "schedules",
    "targets",
    "truncate",
]
