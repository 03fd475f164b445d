"""Relational knowledge distillation: Euclidean distances between rows."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._relations import pairwise_distances
from kdloss.distances._rows import any_width, at_least_one, count, pair_mask, prepare_rows, spread
from kdloss.reduction import fill


@any_width
def rkd_distance(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""Smooth L1 between the Euclidean distances from each row to all others, in units of their mean.

    $\frac1N \sum_j \ell(\hat d^s_{ij} - \hat d^t_{ij})$ with $\hat d_{ij} = \|x_i - x_j\| / \mu$ and $\ell$
    the smooth L1 (Huber) function that turns linear at 1. As in the authors' code, the mean distance $\mu$
    is over the N (N − 1) pairs of different rows, including duplicates, and the loss is the mean over
    all N² pairs, where the diagonal is zero (the paper sums over pairs). Shifts, rotations and the scale of
    either side do not change it. Rows that are all equal have distances 0.

    Distances are computed from differences, not from $|a|^2 + |b|^2 - 2ab$, so near duplicates keep their digits.
    At most N² numbers are kept. Duplicates get no gradient from each other.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (as in the paper), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other,
    so micro-batches don't add up to one batch.

    Raises: ValueError for a single row, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> rkd_distance(torch.tensor([[1.0], [2.0], [3.0]]), teacher)
    tensor([0., 0., 0.])

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, and their code.
    """
    s, t, keep = prepare_rows("rkd_distance", student, teacher, mask)
    values = F.smooth_l1_loss(_relative(s, keep), _relative(t, keep), reduction="none").sum(-1)
    return spread(values / count(keep, values), keep, student.shape[:-1])


def _relative(x: Tensor, keep: Tensor | None) -> Tensor:
    """Distances divided by the mean distance between different rows."""
    n = count(keep, x)
    found = fill(pairwise_distances(x), pair_mask(keep))
    mean = found.sum((1, 2), keepdim=True) / at_least_one(n * (n - 1))
    return found / mean.masked_fill(mean == 0, 1)
