"""Centred kernel alignment."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap
from kdloss.distances._gram import gram
from kdloss.distances._rows import any_width, at_least_one, count, off_diagonal_mask, pair_mask, prepare_rows, spread
from kdloss.reduction import fill


@any_width
def cka(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    unbiased: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""One minus the linear centred kernel alignment (CKA) of the rows, split into one value for each row.

    $1 - \frac{\langle \hat K, \hat L\rangle}{\|\hat K\|_F \|\hat L\|_F} = \tfrac12 \left\|
    \frac{\hat K}{\|\hat K\|} - \frac{\hat L}{\|\hat L\|}\right\|_F^2$ with $K = X_s X_s^\top$, $L = X_t
    X_t^\top$, centred. It is computed in the second form: exactly 0 at the teacher, and 1/2 where the rows of
    one side are all equal. The value of row i is N times its part of the sum, so the mean over rows is the loss.
    Shifts, rotations and the scale of either side do not change it.

    `unbiased=True` centres without the diagonal (U-centring, the $\mathrm{HSIC}_1$ of Song et al.). Use it for
    minibatches: it does not grow with the width when N is small. It needs 4 rows.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares
    examples, `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other,
    so micro-batches don't add up to one batch.

    Raises: ValueError for too few rows, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> cka(rows, 3 * rows.flip(1) + 1).mean() < 1e-6
    tensor(True)

    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414;
    Nguyen, Raghu, Kornblith 2021, arXiv:2010.15327; Song et al. 2012, "Feature Selection via Dependence
    Maximization".
    """
    s, t, keep = prepare_rows("cka", student, teacher, mask, least=4 if unbiased else 2)
    centre = _u_centred if unbiased else _centred
    s, t = (_unit(centre(_gram_of_gaps(x, keep), keep)) for x in (s, t))
    values = squared_gap(s, t).sum(-1) / 2
    return spread(values * count(keep, values), keep, student.shape[:-1])


def _gram_of_gaps(x: Tensor, keep: Tensor | None) -> Tensor:
    """The Gram matrix of the rows minus their mean. The mean needs no gradient, since the result is centred again."""
    mean = x.detach().sum(-2, keepdim=True) / count(keep, x)
    x = fill(x - mean, keep)
    return gram(x)


def _centred(gram: Tensor, keep: Tensor | None) -> Tensor:
    """Centre a Gram matrix: every row and column sums to 0."""
    n = count(keep, gram)
    sums = gram.sum(-1, keepdim=True) / n
    sums = sums - sums.sum(-2, keepdim=True) / (2 * n)
    return fill(gram - sums - sums.mT, pair_mask(keep))


def _u_centred(gram: Tensor, keep: Tensor | None) -> Tensor:
    """Centre a Gram matrix without its diagonal (Székely and Rizzo 2014)."""
    n, there = count(keep, gram), off_diagonal_mask(keep, gram)
    gram = fill(gram, there)
    sums = gram.sum(-1, keepdim=True) / at_least_one(n - 2)
    total = sums.sum(-2, keepdim=True) / at_least_one(n - 1)
    return fill(gram - sums - sums.mT + total, there & (n > 3))


def _unit(matrix: Tensor) -> Tensor:
    return F.normalize(matrix.flatten(1), dim=1).view_as(matrix)
