"""Features at other positions: maps of other sizes, patches of other sizes, class tokens on one side."""

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kdloss.distances import tokens
from kdloss.reduction import precise

__all__ = ["interpolate", "pool"]

Sides = tuple[Tensor, Tensor]


def pool(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    prefix: tuple[int, int] = (0, 0),
) -> Sides:
    """Average the finer side down to the coarser one's positions: `FeatureKD(resize=kdloss.resize.pool)`.

    Features are maps `[B, C, H, W]` or tokens `[B, N, D]` of a square grid, of which the first `prefix`
    (student's, teacher's) are class or register tokens: those both have stay in front, others drop out. In
    each direction apart the finer side goes down, by adaptive average pooling. Two maps come back as
    maps, anything else as tokens.

    Raises: ValueError for features that are no grid.

    >>> student, teacher = torch.zeros(2, 16, 8), torch.zeros(2, 1 + 64, 12)
    >>> [tuple(side.shape) for side in pool(student, teacher, prefix=(0, 1))]
    [(2, 16, 8), (2, 16, 12)]
    """

    def both(s: Tensor, t: Tensor) -> Sides:
        height, width = (min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True))
        return F.adaptive_avg_pool2d(s, (height, width)), F.adaptive_avg_pool2d(t, (height, width))

    return _on_grids(both, student, teacher, prefix)


def interpolate(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    prefix: tuple[int, int] = (0, 0),
) -> Sides:
    """Interpolate the student's features to the teacher's positions, bilinearly; else as `pool`.

    Raises: ValueError for features that are no grid.

    >>> student, teacher = torch.zeros(2, 8, 4, 4), torch.zeros(2, 12, 7, 7)
    >>> [tuple(side.shape) for side in interpolate(student, teacher)]
    [(2, 8, 7, 7), (2, 12, 7, 7)]
    """

    def both(s: Tensor, t: Tensor) -> Sides:
        return F.interpolate(s, t.shape[2:], mode="bilinear", align_corners=False), t

    return _on_grids(both, student, teacher, prefix)


def _on_grids(
    both: Callable[[Tensor, Tensor], Sides], student: Tensor, teacher: Tensor, prefix: tuple[int, int]
) -> Sides:
    (s_front, s), (t_front, t) = _grid("student", student, prefix[0]), _grid("teacher", teacher, prefix[1])
    s, t = both(precise(s), precise(t))
    if student.ndim == teacher.ndim == 4:
        return s, t
    shared = min(prefix)

    def rows(front: Tensor, grid: Tensor) -> Tensor:
        return torch.cat([front[:, :shared].to(grid.dtype), tokens(grid)], 1)

    return rows(s_front, s), rows(t_front, t)


def _grid(whose: str, features: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The tokens in front, `[B, prefix, D]`, and the map `[B, C, H, W]`."""
    if features.ndim == 4:
        return features.new_zeros(len(features), 0, features.shape[1]), features
    if features.ndim != 3:
        raise ValueError(f"{whose} features {tuple(features.shape)} are neither maps nor tokens of a grid")
    count = features.shape[1] - prefix
    side = isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise ValueError(
            f"{whose} features {tuple(features.shape)} have {count} tokens behind prefix={prefix}, which "
            "is no square grid; write functools.partial(kdloss.resize.pool, prefix=(student's, teacher's)) with "
            "the number of class tokens in front"
        )
    return features[:, :prefix], rearrange(features[:, prefix:], "b (h w) c -> b c h w", h=side)
