"""Pair layers by attention."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdloss.reduction import precise


def pair_by_attention(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    distances: Mapping[tuple[int, int], Tensor],
    *,
    scale: float = 1.0,
) -> list[tuple[int, int, Tensor]]:
    r"""Weight all pairs by the student block's attention over the teacher blocks, computed at every position.

    $w_{st} = \frac1S\,\mathrm{softmax}_t(\text{scale}\cdot\langle h_s, h_t\rangle)$ for S student blocks,
    so the weights sum to 1. The dot product is the paper's. With wide features it nearly always picks a
    single block; `scale` $= 1/\sqrt D$ makes the weights softer.

    Use it as `FeatureKD(pairing=kdloss.layers.pair_by_attention)`. The paper takes the distance to the weighted
    mean of teacher features; here it is the weighted mean of the distances. For `mse` and constant weights the
    gradient is the same, because
    $\sum_t a_t \|h_s - h_t\|^2 = \|h_s - \sum_t a_t h_t\|^2 + \text{const}$ where $\sum_t a_t = 1$. For
    other distances the mean of features need not have a meaning. The weights are constants for the gradient, as in
    every learned pairing: the student can't lower the loss by attending to other blocks.

    Shapes: `student` and `teacher` hold features `[..., D]` of one width, by block. Returns a weight `[...]` for each
    pair. Every learned pairing has the parameter `distances`; here only its keys, the pairs, are used.

    Raises: ValueError if the student's features are not as wide as the teacher's.

    >>> student, teacher = {0: torch.tensor([1.0, 0.0])}, {0: torch.zeros(2), 1: torch.tensor([2.0, 0.0])}
    >>> pairs = pair_by_attention(student, teacher, {(0, 0): torch.zeros(()), (0, 1): torch.zeros(())})
    >>> [(s, t, round(w.item(), 3)) for s, t, w in pairs]  # softmax of 0 and 2
    [(0, 0, 0.119), (0, 1, 0.881)]

    Passban et al. 2021, "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation",
    arXiv:2012.14022.
    """
    weights: dict[tuple[int, int], Tensor] = {}
    for s, h in student.items():
        partners = [t for i, t in distances if i == s]
        widths = {h.shape[-1], *(teacher[t].shape[-1] for t in partners)}
        if len(widths) > 1:
            raise ValueError(
                f"features of widths {sorted(widths)} have no dot product; choose a distance that needs a "
                "projection, like kdloss.distances.mse, or another pairing"
            )
        scores = torch.stack([(precise(h) * precise(teacher[t])).sum(-1) for t in partners])
        attention = (scale * scores).softmax(0) / len(student)
        weights |= {(s, t): w for t, w in zip(partners, attention, strict=True)}
    return [(s, t, weights[s, t]) for s, t in distances]
