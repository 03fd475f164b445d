"""Losses between logits: `(student [..., V], teacher [..., V], temperature=T) -> [...]`, one value per position."""

from kdloss.divergences.ab_divergence import ab_divergence
from kdloss.divergences.adaptive_kl import adaptive_kl
from kdloss.divergences.alpha_divergence import alpha_divergence
from kdloss.divergences.bernoulli_kl import bernoulli_kl
from kdloss.divergences.dist import dist
from kdloss.divergences.dkd import dkd
from kdloss.divergences.forward_kl import forward_kl
from kdloss.divergences.hard_labels import hard_labels
from kdloss.divergences.jsd import jsd
from kdloss.divergences.logit_mse import logit_mse
from kdloss.divergences.nkd import nkd
from kdloss.divergences.renyi import renyi
from kdloss.divergences.reverse_kl import reverse_kl
from kdloss.divergences.sinkhorn import sinkhorn
from kdloss.divergences.skewed_forward_kl import skewed_forward_kl
from kdloss.divergences.skewed_reverse_kl import skewed_reverse_kl
from kdloss.divergences.standardized import standardized
from kdloss.divergences.symmetric_kl import symmetric_kl
from kdloss.divergences.total_variation import total_variation
from kdloss.divergences.triangular import triangular
from kdloss.divergences.uld import uld
from kdloss.divergences.with_teacher_temperature import with_teacher_temperature

__all__ = [
    "ab_divergence",
    "adaptive_kl",
    "alpha_divergence",
    "bernoulli_kl",
    "dist",
    "dkd",
    "forward_kl",
    "hard_labels",
    "jsd",
    "logit_mse",
    "nkd",
    "renyi",
    "reverse_kl",
    "sinkhorn",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "standardized",
    "symmetric_kl",
    "total_variation",
    "triangular",
    "uld",
    "with_teacher_temperature",
]
