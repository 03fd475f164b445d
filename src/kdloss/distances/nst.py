"""Neuron selectivity transfer."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap, unit
from kdloss.distances._gram import gram
from kdloss.distances._rows import any_width, count, prepare_rows, spread


@any_width
def nst(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""Squared maximum mean discrepancy between the channels of both sides, split into one value for each position.

    A channel is the vector $f_c$ of its activations over the N positions, scaled to length 1. The kernel is
    $k(f, g) = \langle f, g\rangle^2$ (polynomial, d = 2, c = 0). The loss is $\frac{1}{D^2}\sum k(f^s, f^s) +
    \frac{1}{D'^2}\sum k(f^t, f^t) - \frac{2}{D D'} \sum k(f^s, f^t) =
    \left\|\frac1D\sum_c f^s_c f_c^{s\top} - \frac{1}{D'}\sum_c f^t_c f_c^{t\top}
    \right\|_F^2$, computed in the last form: exactly 0 at the teacher, and never negative. The value of
    position i is N times its row of the sum, so the mean over positions is the loss. A channel that is 0
    everywhere stays 0.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): the N positions of each
    example, for a map `kdloss.distances.tokens(map)`. `mask` is `[..., N]` (True = counts). Returns `[..., N]`, in
    float32 or better. The teacher is detached. Rows are compared with each other.

    Raises: ValueError for a single row, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> nst(torch.eye(2), torch.tensor([[3.0], [0.0]]))  # two channels, one channel
    tensor([0.5000, 0.5000])

    Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    arXiv:1707.01219.
    """
    s, t, keep = prepare_rows("nst", student, teacher, mask)
    values = squared_gap(_outer(s), _outer(t)).sum(-1)
    return spread(values * count(keep, values), keep, student.shape[:-1])


def _outer(x: Tensor) -> Tensor:
    """The mean over the channels of their outer products, `[B, N, N]`."""
    channels = unit(x.mT).mT
    return gram(channels) / max(x.shape[-1], 1)
