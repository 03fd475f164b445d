"""Helpers of distances that compare positions (rows) with each other."""

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
    """Mark a distance that needs no projection: it compares relations between rows, so widths may differ."""
    distance.any_width = True  # type: ignore[attr-defined]
    return distance


def needs_no_width(distance: Any) -> bool:
    """Whether a distance takes features of different widths; looks inside `functools.partial`."""
    while not getattr(distance, "any_width", False) and isinstance(distance, partial):
        distance = distance.func
    return getattr(distance, "any_width", False)


def prepare_rows(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    same_width: bool = False,
    least: int = 2,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both sides as `[B, N, D]` in float32 or better, 0 where masked, and the mask `[B, N]` (None: all rows count)."""
    _checks.rows(name, student, teacher, same_width, least)
    if mask is not None:
        _checks.mask(mask, student.shape[:-1], "positions")
        student, teacher = fill(student, mask), fill(teacher, mask)
    student, teacher = alike(student, teacher.detach())
    if student.ndim == 3:
        return student, teacher, mask
    return student.unsqueeze(0), teacher.unsqueeze(0), None if mask is None else mask.unsqueeze(0)


def full_mask(keep: Tensor | None, x: Tensor) -> Tensor:
    """The mask of the rows of `x` that count, also where `keep` is None."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep


def count(keep: Tensor | None, x: Tensor) -> Tensor | int:
    """The number of rows that count in each example, at least 1; a tensor is shaped to divide `x` `[B, N, ...]`."""
    if keep is None:
        return at_least_one(x.shape[1])
    return keep.sum(-1).clamp_min(1).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def at_least_one(n: Tensor | int) -> Tensor | int:
    """The count, or 1 instead of 0, so that it can be a divisor."""
    return n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of all rows of `x` with all rows of `y`, `[..., N, M]`, in their own dtype even under autocast."""
    if not _cast(x):
        return x @ y.mT
    with own_precision(x):
        return x @ y.mT


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off for computations with `x`."""
    return torch.autocast(x.device.type, enabled=False) if _cast(x) else nullcontext()


def _cast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def pair_mask(keep: Tensor | None) -> Tensor | None:
    """The pairs of rows that are compared, `[B, N, N]` (None: all)."""
    return None if keep is None else keep.unsqueeze(-1) & keep.unsqueeze(-2)


def off_diagonal_mask(keep: Tensor | None, x: Tensor) -> Tensor:
    """`pair_mask` without the diagonal, also where `keep` is None."""
    off_diagonal = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    there = pair_mask(keep)
    return off_diagonal.expand(x.shape[0], -1, -1) if there is None else there & off_diagonal


def spread(values: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    """Values `[B, N]`, or one per example `[B, 1]`, in the shape of the positions; 0 for rows that don't count."""
    return fill(values.expand(-1, shape[-1]), keep).reshape(shape)
