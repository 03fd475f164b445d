"""Correlation congruence."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap, unit
from kdloss.distances._gram import gram
from kdloss.distances._rows import any_width, count, prepare_rows, spread


@any_width
def correlation_congruence(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    gamma: float = 0.4,
    order: int = 2,
) -> Float[Tensor, "*batch rows"]:
    r"""Squared difference between the student's and the teacher's correlations of rows, for each row.

    $\frac1N \sum_j (C^s_{ij} - C^t_{ij})^2$, where $C_{ij} = e^{-2\gamma} \sum_{p=0}^{P}
    \frac{(2\gamma)^p}{p!} \langle \hat x_i, \hat x_j\rangle^p$ is the Gaussian kernel
    $e^{-\gamma \|\hat x_i - \hat x_j\|^2}$ of the unit vectors, expanded to order P (`order`). Its mean over the rows
    is the paper's $\frac{1}{N^2}\|C^s - C^t\|_F^2$.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (as in the paper), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other,
    so micro-batches don't add up to one batch.

    Raises: ValueError for a single row, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> correlation_congruence(torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]]))
    tensor([0., 0.])

    Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", arXiv:1904.01802.
    """
    s, t, keep = prepare_rows("correlation_congruence", student, teacher, mask)
    s, t = (_expanded(unit(x), gamma, order) for x in (s, t))
    values = squared_gap(s, t).sum(-1)
    return spread(values / count(keep, values), keep, student.shape[:-1])


def _expanded(x: Tensor, gamma: float, order: int) -> Tensor:
    """The expansion without its constant of order 0, which cancels; it is 0 for rows that don't count."""
    cosines = gram(x)
    terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(1, order + 1)]
    return math.exp(-2 * gamma) * sum(terms, start=0 * cosines)
