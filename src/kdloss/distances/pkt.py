"""Probabilistic knowledge transfer."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import unit
from kdloss.distances._gram import gram
from kdloss.distances._relations import kl_over
from kdloss.distances._rows import any_width, count, pair_mask, prepare_rows, spread
from kdloss.reduction import widest


@any_width
def pkt(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch rows"]:
    r"""KL(teacher || student) between the distributions of each row over its neighbours, divided by the number of rows.

    $\frac1N \sum_j p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}$ with $p_{j|i}$ proportional to
    $\frac12 (\cos(t_i, t_j) + 1) + \epsilon$, and q the student's. As in the authors' code, a row is a
    neighbour of itself, and the mean is over all N² pairs (the paper leaves the row itself out and sums). Their
    code adds $\epsilon$ (`eps`) inside the logarithm only. Here it is part of the distributions, so the
    value is never negative. The cosine of a zero vector with any other is 0.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (as in the paper), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other,
    so micro-batches don't add up to one batch.

    Raises: ValueError for a single row, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> pkt(torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]]))
    tensor([0., 0.])

    Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    arXiv:1803.10837, and their code.
    """
    s, t, keep = prepare_rows("pkt", student, teacher, mask)
    # For rows in opposite directions 1 + cos is the small difference of two numbers, and its logarithm is taken.
    wide = widest(s.device)
    values = kl_over(_neighbours(s.to(wide), eps), _neighbours(t.to(wide), eps), pair_mask(keep)).to(s.dtype)
    return spread(values / count(keep, values), keep, student.shape[:-1])


def _neighbours(x: Tensor, eps: float) -> Tensor:
    """Logits of each row's distribution over its neighbours."""
    x = unit(x)
    return (((gram(x) + 1) / 2).clamp_min(0) + eps).log()
