"""Both sides of a distance that compares positions with each other."""

from collections.abc import Callable
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Features `[B, N, D]` in float32 or better, 0 where they don't count, and which rows do `[B, N]`."""
    _checks.rows(name, student, teacher, same_width, least)
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask is not None:
        _checks.mask(mask, student.shape[:-1], "positions")
        keep = mask
        student, teacher = fill(student, mask), fill(teacher, mask)
    student, teacher, keep = (x if student.ndim == 3 else x.unsqueeze(0) for x in (student, teacher, keep))
    student, teacher = alike(student, teacher.detach())
    return student, teacher, keep


def count(keep: Tensor, like: Tensor) -> Tensor:
    """How many rows of each example count, at least 1, `[B, 1]`."""
    return keep.sum(-1, keepdim=True).clamp_min(1).to(like.dtype)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Of every row with every row, `[..., N, M]`, in their own precision under autocast too."""
    if x.is_meta:  # has no autocast
        return x @ y.mT
    with torch.autocast(x.device.type, enabled=False):
        return x @ y.mT


def pairs(keep: Tensor) -> Tensor:
    """Which rows are compared with which, `[B, N, N]`."""
    return keep.unsqueeze(-1) & keep.unsqueeze(-2)


def spread(values: Tensor, keep: Tensor, shape: torch.Size) -> Tensor:
    """Values `[B, N]`, or one per example `[B, 1]`, of the rows that count, in the positions' own shape."""
    return fill(values.expand(keep.shape), keep).reshape(shape)
