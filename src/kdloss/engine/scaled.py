"""Multiply gradients by the upstream gradient, which is one number."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdloss.engine.switch import wanted
from kdloss.reduction import on_cpu

PART = 2**24
"""How many entries are multiplied at a time uncompiled; fewer entries are not worth compiling for."""
_log = logging.getLogger("kdloss")
_compiled: list[Callable[[Tensor, Tensor], None]] = []


def scaled(gradients: Sequence[Tensor | None], by: Tensor) -> Sequence[Tensor | None]:
    """Multiply gradients by a number in place; on a CPU nothing is done if the number is 1."""
    if on_cpu(by.device) and by.item() == 1:
        return gradients
    return [None if g is None else _times(g, by) for g in gradients]


def _times(gradient: Tensor, by: Tensor) -> Tensor:
    if on_cpu(by.device) or not gradient.is_contiguous():
        return gradient.mul_(by)
    flat = gradient.view(-1)
    if len(flat) < PART or not wanted(by.device):
        _in_parts(flat, by)
        return gradient
    torch._dynamo.maybe_mark_dynamic(flat, 0)
    try:
        _multiply_at_once()(flat, by)
    except Exception as error:  # a compiler may raise anything, and raises before anything was multiplied
        _log.warning("gradients are multiplied uncompiled: %s", str(error).strip()[:500])
        _compiled[:] = [_in_parts]
        _in_parts(flat, by)
    return gradient


def _multiply(flat: Tensor, by: Tensor) -> None:
    """Multiply in float32 where the dtype has fewer digits, so that the number is not rounded to it."""
    flat.copy_(flat.float() * by.float()) if flat.dtype.itemsize < 4 else flat.mul_(by)


def _in_parts(flat: Tensor, by: Tensor) -> None:
    for start in range(0, len(flat), PART):
        _multiply(flat[start : start + PART], by)


def _multiply_at_once() -> Callable[[Tensor, Tensor], None]:
    if not _compiled:
        _compiled.append(torch.compile(_multiply))
    return _compiled[0]
