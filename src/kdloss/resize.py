"""Match the positions of student and teacher: maps or patches of different sizes, class tokens on one side."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise

__all__ = ["interpolate", "pool"]

Sides = tuple[Tensor, Tensor]
Grid = tuple[int, ...]
Sizes = Grid | tuple[Grid | None, Grid | None] | None


def pool(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    prefix: tuple[int, int] = (0, 0),
    size: Sizes = None,
) -> Sides:
    """Average-pool the finer side to the positions of the coarser one: `FeatureKD(resize=kdloss.resize.pool)`.

    `student` and `teacher` are maps `[B, C, H, W]`, volumes `[B, C, D, H, W]` or tokens `[B, N, D]`. Adaptive average
    pooling reduces the finer side, separately in each direction. Two maps stay maps; all else comes back as tokens.

    - `prefix`: the number of class or register tokens in front, (student's, teacher's). Those that both sides have stay
      in front; the others are dropped.
    - `size`: the grid of the other tokens, row by row: (H, W), or one for each side, (student's, teacher's), with None
      for a map. One number may be -1. (-1,) is a sequence and three numbers are a volume. If both sides have the same
      number of positions, nothing is pooled and no size is needed.

    Raises: ValueError for tokens without a grid, or with one that doesn't fit, and for grids with different numbers of
    axes.

    >>> student, teacher = torch.zeros(2, 18, 8), torch.zeros(2, 1 + 72, 12)
    >>> [tuple(side.shape) for side in pool(student, teacher, prefix=(0, 1), size=((3, 6), (6, 12)))]
    [(2, 18, 8), (2, 18, 12)]
    """

    def both(s: Tensor, t: Tensor) -> Sides:
        coarse = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        pooled: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(coarse) - 1]
        return pooled(s, coarse), pooled(t, coarse)

    return _on_grids(both, student, teacher, prefix, size)


def interpolate(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    *,
    prefix: tuple[int, int] = (0, 0),
    size: Sizes = None,
) -> Sides:
    """Interpolate the student's features to the teacher's positions, linearly in each direction.

    `student`, `teacher`, `prefix`, `size`, the returned features and the errors are as in `pool`.

    >>> student, teacher = torch.zeros(2, 8, 4, 4), torch.zeros(2, 12, 7, 7)
    >>> [tuple(side.shape) for side in interpolate(student, teacher)]
    [(2, 8, 7, 7), (2, 12, 7, 7)]
    """

    def both(s: Tensor, t: Tensor) -> Sides:
        mode = ("linear", "bilinear", "trilinear")[s.ndim - 3]
        return F.interpolate(s, t.shape[2:], mode=mode, align_corners=False), t

    return _on_grids(both, student, teacher, prefix, size)


def _on_grids(
    both: Callable[[Tensor, Tensor], Sides], student: Tensor, teacher: Tensor, prefix: tuple[int, int], size: Sizes
) -> Sides:
    sides = _Side("student", student, prefix[0]), _Side("teacher", teacher, prefix[1])
    per_side = size is not None and any(not isinstance(n, int) for n in size)
    each: Any = size if per_side else (size, size)
    found = [side.grid(one, per_side) for side, one in zip(sides, each, strict=True)]
    if sides[0].count == sides[1].count:  # equally many positions: any grid will do
        own = next((grid for grid in found if grid is not None), (sides[0].count,))
        found = [grid or own for grid in found]
    for side, grid in zip(sides, found, strict=True):
        if grid is None:
            raise ValueError(f"{side}, and their grid isn't given; {_SAY}")
    grids = [grid for grid in found if grid is not None]
    if len(grids[0]) != len(grids[1]):
        raise ValueError(f"student and teacher have grids of different kinds, {grids[0]} and {grids[1]}; {_SAY}")
    maps = both(*(precise(side.on(grid)) for side, grid in zip(sides, grids, strict=True)))
    if student.ndim == teacher.ndim > 3:
        return maps
    s, t = (side.behind_front(min(prefix), x.flatten(2).mT) for side, x in zip(sides, maps, strict=True))
    return s, t


_SAY = (
    "write functools.partial(kdloss.resize.pool, size=(H, W)), or size=((H, W), (H, W)) for student and teacher; "
    "(-1,) is a sequence. Class tokens in front are prefix=(student's, teacher's)"
)


class _Side:
    """Features of one side: a map, or tokens with class tokens in front."""

    def __init__(self, whose: str, features: Tensor, prefix: int) -> None:
        if features.ndim not in (3, 4, 5):
            raise ValueError(
                f"{whose} features {tuple(features.shape)} are neither maps [B, C, H, W], volumes [B, C, D, H, W] nor "
                "tokens [B, N, D]"
            )
        self.whose, self.features, self.tokens = whose, features, features.ndim == 3
        self.prefix = prefix * self.tokens
        self.count = features.shape[1] - prefix if self.tokens else features.shape[2:].numel()

    def __str__(self) -> str:
        front = f" behind prefix={self.prefix}" if self.tokens else ""
        return f"{self.whose} features {tuple(self.features.shape)} have {self.count} positions{front}"

    def grid(self, size: Grid | None, per_side: bool) -> Grid | None:
        """The grid of a map, or `size` for tokens; with `per_side` the size was given for this side alone."""
        own = None if self.tokens else tuple(self.features.shape[2:])
        if size is None or (own is not None and not per_side):
            return own
        found = _checks.grid(tuple(size), self.count)
        if found is None or own not in (None, found):
            raise ValueError(f"{self}, which don't fit a grid of size={tuple(size)}; {_SAY}")
        return found

    def on(self, grid: Grid) -> Tensor:
        """The features as a map `[B, C, *grid]`."""
        x = self.features
        return x[:, self.prefix :].mT.reshape(x.shape[0], x.shape[2], *grid) if self.tokens else x

    def behind_front(self, front: int, tokens: Tensor) -> Tensor:
        """Put the first `front` tokens of these features before the given tokens."""
        return torch.cat([self.features[:, :front].to(tokens.dtype), tokens], 1) if front and self.tokens else tokens
