"""Both sides of a distance that compares positions with each other."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import alike, fill

F = TypeVar("F", bound=Callable[..., Any])


def any_width(distance: F) -> F:
    """Mark a distance that holds relations against relations: widths may differ, unprojected."""
    distance.any_width = True  # type: ignore[attr-defined]
    return distance


def needs_no_width(distance: Any) -> bool:
    """Whether a distance, under any `functools.partial`, takes features of different widths."""
    while not getattr(distance, "any_width", False) and isinstance(distance, partial):
        distance = distance.func
    return getattr(distance, "any_width", False)


def rows(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    same_width: bool = False,
    least: int = 2,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features `[B, N, D]` in float32 or better, 0 where they don't count, and which rows do `[B, N]` (None: all)."""
    _checks.rows(name, student, teacher, same_width, least)
    if mask is not None:
        _checks.mask(mask, student.shape[:-1], "positions")
        student, teacher = fill(student, mask), fill(teacher, mask)
    student, teacher = alike(student, teacher.detach())
    if student.ndim == 3:
        return student, teacher, mask
    return student.unsqueeze(0), teacher.unsqueeze(0), None if mask is None else mask.unsqueeze(0)


def whole(keep: Tensor | None, x: Tensor) -> Tensor:
    """Which rows of `x` count, as a mask in any case."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep


def count(keep: Tensor | None, x: Tensor) -> Tensor | int:
    """How many rows of each example count, at least 1, to divide what has the axes of `x` `[B, N, ...]`."""
    if keep is None:
        return at_least_one(x.shape[1])
    return keep.sum(-1).clamp_min(1).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def at_least_one(n: Tensor | int) -> Tensor | int:
    """A count to divide by."""
    return n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Of every row with every row, `[..., N, M]`, in their own precision under autocast too."""
    if not _cast(x):
        return x @ y.mT
    with own_precision(x):
        return x @ y.mT


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast of what is computed of `x`."""
    return torch.autocast(x.device.type, enabled=False) if _cast(x) else nullcontext()


def _cast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def pairs(keep: Tensor | None) -> Tensor | None:
    """Which rows are compared with which, `[B, N, N]` (None: all)."""
    return None if keep is None else keep.unsqueeze(-1) & keep.unsqueeze(-2)


def others(keep: Tensor | None, x: Tensor) -> Tensor:
    """The same without the rows themselves, as a mask in any case."""
    apart = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    there = pairs(keep)
    return apart.expand(x.shape[0], -1, -1) if there is None else there & apart


def spread(values: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    """Values `[B, N]`, or one per example `[B, 1]`, of the rows that count, in the positions' own shape."""
    return fill(values.expand(-1, shape[-1]), keep).reshape(shape)
