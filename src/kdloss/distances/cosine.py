"""Cosine distance."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, squared_gap


def cosine(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    *,
    eps: float = 1e-8,
) -> Float[Tensor, "*batch"]:
    r"""One minus the cosine of the angle between the features, at every position.

    $1 - \cos(s, t) = \tfrac12 \left\| \frac{s}{\|s\|} - \frac{t}{\|t\|} \right\|^2$, computed in
    the second form: exactly 0 with zero gradient at the teacher, and never negative. Norms below `eps`
    count as `eps`, so the distance of a zero vector is 0 from itself and 1/2 from any other vector.

    Shapes: student and teacher `[..., D]`. Returns `[...]` between 0 and 2, in float32 or better.
    The teacher is detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0]))
    tensor(1.)

    Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT", arXiv:1910.01108.
    """
    student, teacher = features(student, teacher)
    s, t = (F.normalize(x, dim=-1, eps=eps) for x in (student, teacher))
    return squared_gap(s, t).sum(-1) / 2
