"""Attention transfer: the positions of a map where activations are large."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import mean, squared_gap
from kdloss.distances._rows import any_width, prepare_rows, spread


@any_width
def attention_transfer(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    paper: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""Squared difference of the normalised attention maps, at every position.

    $(\hat a^s_n - \hat a^t_n)^2$ with $a_n = \frac1D \sum_d x_{nd}^2$ and $\hat a = a / \|a\|_2$ over the
    positions of the example: the authors' code, whose mean over positions and examples is the loss there.
    `paper=True` gives every position the paper's $\|\hat a^s - \hat a^t\|_2$ of its example instead; its
    gradient nearly vanishes close to the teacher. The weight to use with it is half of the paper's $\beta$.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ), or `kdloss.distances.tokens(map)`;
    mask `[..., N]` (True = counts). Returns `[..., N]`, in float32 or better. The teacher is detached.

    Raises: ValueError for positions or devices that differ, and for maps (call `tokens` first); TypeError for
    integer features.

    >>> import torch
    >>> attention_transfer(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    tensor([1., 1.])

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", arXiv:1612.03928, and their code.
    """
    s, t, keep = prepare_rows("attention_transfer", student, teacher, mask, least=1)
    s, t = (F.normalize(mean(x.square()), dim=-1) for x in (s, t))
    values = (s - t).norm(dim=-1, keepdim=True) if paper else squared_gap(s, t)
    return spread(values, keep, student.shape[:-1])
