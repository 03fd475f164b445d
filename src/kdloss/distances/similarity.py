"""Similarity-preserving distillation."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap
from kdloss.distances._gram import gram
from kdloss.distances._rows import any_width, count, prepare_rows, spread


@any_width
def similarity(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""Squared difference between the normalised Gram matrices (similarities) of the rows, for each row.

    $\frac1N \sum_j (\hat G^s_{ij} - \hat G^t_{ij})^2$ with $G = X X^\top$ and every row of $\hat G$ scaled
    to length 1. Its mean over the N rows is the paper's $\frac{1}{N^2}\|\hat G^s - \hat G^t\|_F^2$.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (as in the paper, with each example's map flattened: `kdloss.distances.between_examples`), `[B, N, D]` the positions
    of each example. `mask` is `[..., N]` (True = counts). Returns `[..., N]`, in float32 or better. The teacher
    is detached. Rows are compared with each other, so micro-batches don't add up to one batch.

    Raises: ValueError for a single row, for positions or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> similarity(torch.eye(2), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]]))
    tensor([0., 0.])

    Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682.
    """
    s, t, keep = prepare_rows("similarity", student, teacher, mask)
    s, t = (F.normalize(gram(x), dim=-1) for x in (s, t))
    values = squared_gap(s, t).sum(-1)
    return spread(values / count(keep, values), keep, student.shape[:-1])
