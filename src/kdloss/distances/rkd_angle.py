"""Relational knowledge distillation, by angles."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._relations import angles, by_vertex, seen_from
from kdloss.distances._rows import any_width, count, rows, spread


@any_width
def rkd_angle(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""The angles of all triangles of rows: smooth L1 between both sides' cosines, vertex by vertex.

    $\frac{1}{N^2} \sum_{jk} \ell(\cos^s_{jik} - \cos^t_{jik})$ for vertex i, with $\cos_{jik} =
    \left\langle \frac{x_j - x_i}{\|x_j - x_i\|}, \frac{x_k - x_i}{\|x_k - x_i\|} \right\rangle$ and $\ell$
    the smooth L1 (Huber) function that turns linear at 1. As in the authors' code, the mean goes over all
    N³ triples, those with j or k at the vertex (cosine 0) and j = k (cosine 1) among them; the paper sums.
    Blind to shifts, rotations and scale of either side. A duplicate of the vertex has no angle: cosine 0.

    Triples are computed a few vertices at a time and, where there are many, once more in the backward pass: memory
    grows with N², time with N³ D.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ): `[N, D]` compares examples
    (the paper's), `[B, N, D]` the positions of each example. `mask` is `[..., N]` (True = counts). Returns
    `[..., N]`, in float32 or better. The teacher is detached. Rows are compared with each other:
    micro-batches of rows don't add up to one batch.

    Raises: ValueError for one or two rows alone, positions or devices that differ, or maps that are not
    rows; TypeError for integer features.

    >>> import torch
    >>> right = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    >>> flat = torch.tensor([[0.0], [1.0], [-1.0]])
    >>> rkd_angle(flat, right)[0]  # the first vertex: cosine -1 for 0, twice in 9
    tensor(0.1111)

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", arXiv:1904.05068, and their code.
    """
    s, t, keep = rows("rkd_angle", student, teacher, mask, least=3)
    batch, n, width = s.shape
    values = by_vertex(_gaps, n, batch * n * (n + width), s, t, keep)
    return spread(values / count(keep, values) ** 2, keep, student.shape[:-1])


def _gaps(start: int, stop: int, s: Tensor, t: Tensor, keep: Tensor | None) -> Tensor:
    """Of all angles at these vertices."""
    there = None if keep is None else keep.unsqueeze(1).expand(-1, stop - start, -1)
    a, b = (angles(seen_from(x, start, stop), there) for x in (s, t))
    return F.smooth_l1_loss(a, b, reduction="none").sum((-2, -1))
