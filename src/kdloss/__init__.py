"""Knowledge-distillation losses that drop into a training loop you already have."""

from importlib import import_module
from typing import Any

from kdloss import (
    analysis,
    balancing,
    distances,
    divergences,
    layers,
    projections,
    resize,
    schedules,
    targets,
    terms,
    weighting,
)
from kdloss._capture import Captured, capture
from kdloss._cross_entropy import cross_entropy
from kdloss.advice import suggest
from kdloss.bases import base_of
from kdloss.chains import chain
from kdloss.criteria import FeatureKD, MultiTeacherKD, VanillaKD
from kdloss.distillation import Distillation
from kdloss.distilled import Distilled
from kdloss.distiller import Distiller
from kdloss.engine import set_compile
from kdloss.reduction import masked, reduce
from kdloss.students import keep_blocks
from kdloss.targets import LazyLogits, Mixture, ShardedLogits, TokenMap, TopKLogits, truncate
from kdloss.teacher import Teacher
from kdloss.terms import CrossEntropy, Features, Logits, Sum, Task

__version__ = "0.1.0"

__all__ = [
    "Captured",
    "CrossEntropy",
    "Distillation",
    "Distilled",
    "Distiller",
    "FeatureKD",
    "Features",
    "LazyLogits",
    "Logits",
    "Mixture",
    "MultiTeacherKD",
    "ShardedLogits",
    "Sum",
    "Task",
    "Teacher",
    "TokenMap",
    "TopKLogits",
    "VanillaKD",
    "analysis",
    "balancing",
    "base_of",
    "capture",
    "chain",
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
    "set_compile",
    "suggest",
    "targets",
    "terms",
    "truncate",
    "weighting",
]


def __getattr__(name: str) -> Any:
    """Import `kdloss.cache` and `kdloss.hf`, which need the extra "hf", when they are first used."""
    if name in ("cache", "hf"):
        return import_module(f"kdloss.{name}")
    raise AttributeError(f"module 'kdloss' has no attribute {name!r}")
