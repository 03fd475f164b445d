"""Relational knowledge distillation: angles."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._relations import angles, by_vertex, relative_to
from kdloss.distances._rows import any_width, count, prepare_rows, spread


@any_width
def rkd_angle(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""Smooth L1 between the cosines of the angles of all triangles of rows, for each vertex.

    $\frac{1}{N^2} \sum_{jk} \ell(\cos^s_{jik} - \cos^t_{jik})$ for vertex i, with $\cos_{jik} =
    \left\langle \frac{x_j - x_i}{\|x_j - x_i\|}, \frac{x_k - x_i}{\|x_k - x_i\|} \right\rangle$ and $\ell$
    the smooth L1 (Huber) function that turns linear at 1. As in the authors' code, the mean is over all
    N³ triples, including those with j or k at the vertex (cosine 0) and those with j = k (cosine 1); the paper
    sums. Shifts, rotations and the scale of either side do not change it. A duplicate of the vertex has no angle
    (cosine 0).

    Triples are computed a few vertices at a time. Where there are many, the backward pass computes them again, so
    memory grows with N² and time with N³ D.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (as in the paper), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other,
    so micro-batches don't add up to one batch.

    Raises: ValueError for fewer than three rows, for positions or devices that differ, and for maps (call
    `tokens` first); TypeError for integer features.

    >>> import torch
    >>> right = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    >>> flat = torch.tensor([[0.0], [1.0], [-1.0]])
    >>> rkd_angle(flat, right)[0]  # the first vertex: cosine -1 for 0, twice in 9
    tensor(0.1111)

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, and their code.
    """
    s, t, keep = prepare_rows("rkd_angle", student, teacher, mask, least=3)
    batch, n, width = s.shape
    values = by_vertex(_gaps, n, batch * n * (n + width), s, t, keep)
    return spread(values / count(keep, values) ** 2, keep, student.shape[:-1])


def _gaps(start: int, stop: int, s: Tensor, t: Tensor, keep: Tensor | None) -> Tensor:
    """The smooth L1 loss of all angles at the vertices from start to stop, summed over the angles."""
    there = None if keep is None else keep.unsqueeze(1).expand(-1, stop - start, -1)
    a, b = (angles(relative_to(x, start, stop), there) for x in (s, t))
    return F.smooth_l1_loss(a, b, reduction="none").sum((-2, -1))
