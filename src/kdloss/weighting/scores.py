"""Scores of teachers, and the weightings made from them."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdloss.weighting._weighting import Weighting


def of_label(logits: Float[Tensor, "rows classes"], labels: Int64[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Cross-entropy of a teacher's `logits` against the `labels`."""
    there = labels < logits.shape[-1]
    found = F.cross_entropy(logits, labels * there, reduction="none")
    return found.where(there, math.log(logits.shape[-1]))


def of_entropy(logits: Float[Tensor, "rows classes"], labels: object) -> Float[Tensor, " rows"]:
    """The entropy of a teacher's predictions, softmax of `logits`; `labels` are not read."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def least(scores: Float[Tensor, " teachers *batch"]) -> Float[Tensor, " teachers *batch"]:
    r"""$\frac{1}{K-1}\left(1 - \frac{\exp s_k}{\sum_j \exp s_j}\right)$ of `scores`; a lower score gives more."""
    if len(scores) == 1:
        return torch.ones_like(scores)
    return (1 - scores.clamp(max=1e30).softmax(0)) / (len(scores) - 1)


confidence = Weighting(of_label, least, name="confidence")
r"""Weighs teachers by their cross-entropy $s_k$ against the labels: $\frac{1}{K-1}\left(1 - \frac{\exp s_k}{\sum_j \exp
s_j}\right)$ at each position.

Zhang, Chen, Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation", arXiv:2201.00007.
"""


entropy = Weighting(of_entropy, least, labels=False, name="entropy")
r"""Weighs teachers by the entropy $s_k$ of their predictions, with the formula of `confidence`; needs no labels.

After Kwon, Na, Lee, Kim 2020, "Adaptive Knowledge Distillation Based on Entropy", ICASSP, where teachers with low
entropy have larger weights.
"""
