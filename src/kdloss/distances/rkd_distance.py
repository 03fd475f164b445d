"""Relational knowledge distillation, by distances."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._relations import distances
from kdloss.distances._rows import any_width, at_least_one, count, pairs, rows, spread
from kdloss.reduction import fill


@any_width
def rkd_distance(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""How far each row is from every other, in units of the mean: smooth L1 of the differences.

    $\frac1N \sum_j \ell(\hat d^s_{ij} - \hat d^t_{ij})$ with $\hat d_{ij} = \|x_i - x_j\| / \mu$ and $\ell$
    the smooth L1 (Huber) function that turns linear at 1. As in the authors' code, the mean distance $\mu$
    is that of the N (N − 1) pairs of different rows, duplicates among them, and the loss is the mean over
    all N² pairs, to which the diagonal adds zeros (the paper sums over pairs). Blind to shifts, rotations
    and scale of either side; rows that are all alike have distances 0.

    Distances come from differences, not from $|a|^2 + |b|^2 - 2ab$: near duplicates keep their digits. No more
    than N² numbers are kept. Duplicates get no gradient from each other.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (the paper's), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other:
    micro-batches of rows don't add up to one batch.

    Raises: ValueError for one row alone, positions or devices that differ, or maps that are not rows;
    TypeError for integer features.

    >>> import torch
    >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> rkd_distance(torch.tensor([[1.0], [2.0], [3.0]]), teacher)
    tensor([0., 0., 0.])

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, and their code.
    """
    s, t, keep = rows("rkd_distance", student, teacher, mask)
    values = F.smooth_l1_loss(_relative(s, keep), _relative(t, keep), reduction="none").sum(-1)
    return spread(values / count(keep, values), keep, student.shape[:-1])


def _relative(x: Tensor, keep: Tensor | None) -> Tensor:
    """Distances over the mean of those between different rows."""
    n = count(keep, x)
    found = fill(distances(x), pairs(keep))
    mean = found.sum((1, 2), keepdim=True) / at_least_one(n * (n - 1))
    return found / mean.masked_fill(mean == 0, 1)
