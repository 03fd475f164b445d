"""Centred kernel alignment."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._rows import any_width, count, pairs, product, rows, spread
from kdloss.reduction import fill


@any_width
def cka(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    unbiased: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""One minus the linear centred kernel alignment of the rows, as a share for each row.

    $1 - \frac{\langle \hat K, \hat L\rangle}{\|\hat K\|_F \|\hat L\|_F} = \tfrac12 \left\|
    \frac{\hat K}{\|\hat K\|} - \frac{\hat L}{\|\hat L\|}\right\|_F^2$ with $K = X_s X_s^\top$, $L = X_t
    X_t^\top$, centred, computed in the second form: exactly 0 at the teacher, and 1/2 where the rows of one
    side are all alike. Row i has N times its part of the sum, so that the mean over rows is the whole.
    Blind to shifts, rotations and scale of either side.

    `unbiased=True` centres without the diagonal (U-centring, the $\mathrm{HSIC}_1$ of Song et al.), which
    does not grow with the width when N is small: the form for minibatches. It needs 4 rows.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares
    examples, `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other:
    micro-batches of rows don't add up to one batch.

    Raises: ValueError for too few rows, positions or devices that differ, or maps that are not rows;
    TypeError for integer features.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> cka(rows, 3 * rows.flip(1) + 1).mean() < 1e-6
    tensor(True)

    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414;
    Nguyen, Raghu, Kornblith 2021, arXiv:2010.15327; Song et al. 2012, "Feature Selection via Dependence
    Maximization".
    """
    s, t, keep = rows("cka", student, teacher, mask, least=4 if unbiased else 2)
    centre = _u_centred if unbiased else _centred
    gap = _unit(centre(s, keep)) - _unit(centre(t, keep))
    values = gap.square().sum(-1) / 2 * count(keep, gap)
    return spread(values, keep, student.shape[:-1])


def _centred(x: Tensor, keep: Tensor) -> Tensor:
    """The Gram matrix of rows less their mean."""
    x = _less_mean(x, keep)
    return product(x, x)


def _less_mean(x: Tensor, keep: Tensor) -> Tensor:
    """Rows less their mean, 0 where they don't count."""
    n = count(keep, x).unsqueeze(-1)
    for _ in range(2):  # the first mean is rounded as the rows are, which may be nearly alike
        x = fill(x - x.sum(-2, keepdim=True) / n, keep)
    return x


def _u_centred(x: Tensor, keep: Tensor) -> Tensor:
    """The Gram matrix without its diagonal, every row's and column's sum 0 (Székely and Rizzo 2014)."""
    n = count(keep, x).unsqueeze(-1)
    x = _less_mean(x, keep)  # changes nothing but rounding
    others = pairs(keep) & ~torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    gram = fill(product(x, x), others)
    sums = gram.sum(-1, keepdim=True) / (n - 2).clamp_min(1)
    whole = sums.sum(-2, keepdim=True) / (n - 1).clamp_min(1)
    return fill(gram - sums - sums.mT + whole, others & (n > 3))


def _unit(matrix: Tensor) -> Tensor:
    return F.normalize(matrix.flatten(1), dim=1).view_as(matrix)
