"""Rows against a teacher of which the k most probable classes were kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.once import behind
from kdloss.engine.side import LN2, Side, finite, wide_sum
from kdloss.reduction import on_cpu
from kdloss.targets import TopKLogits
from kdloss.targets.few_classes import base, logits, slots

ENOUGH = 2.0**-40
"""The least mass, in exponentials of which the largest is 1, whose logarithm is as exact as float32 can say it."""
AmongFew = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Student's and teacher's logits of a few classes `[r, k + 1]` -> values `[r, 1]` and, if wanted, their slopes."""


class TopK(NamedTuple):
    """Values `[r, 1]`, and the gradient: `slope` at `classes`, and `share` of what the `others` have."""

    value: Tensor
    others: Tensor | None
    share: Tensor
    classes: Tensor
    slope: Tensor | None


class Others(NamedTuple):
    """The classes that were not kept: their mass, its sum, its logarithm as a logit, and what they are relative to.

    That is their own largest, as beside the classes kept they may be too small for a number.
    """

    mass: Tensor
    total: Tensor
    size: Tensor
    top: Tensor


def among_few(compare: AmongFew, rest: Callable[..., Others], z: Tensor, teacher: TopKLogits) -> TopK:
    """Compared among the k classes and a bucket, at the temperature the teacher's were kept at.

    In the student's logits the bucket's gradient goes to the classes in it by their share of its mass.
    """
    indices, empty = slots(teacher)
    nothing = empty.all(-1, keepdim=True)
    kept = z.gather(-1, indices).masked_fill(empty, -torch.inf)
    if teacher.tail == "renormalise":
        few, others = kept - base(kept), None
    else:
        others = rest(indices, teacher.temperature)
        low = base(kept, others.top)
        few = torch.cat([kept - low, others.size + (finite(others.top) - low)], -1)
    theirs = logits(teacher, empty, z.shape[-1]).to(few.dtype)
    value, slope = compare(behind(few.masked_fill(nothing, 0)), behind(theirs))
    value, k = value.masked_fill(nothing, 0), indices.shape[-1]
    if slope is None:
        return TopK(value, None, value, indices, None)
    slope = behind(slope)
    slope_at = slope[:, :k].masked_fill(empty | nothing, 0)
    if others is None:
        return TopK(value, None, value, indices, slope_at)
    share = slope[:, k:] / others.total.masked_fill(others.total == 0, 1)
    return TopK(value, others.mass, share, indices, slope_at)


def others_in_place(z: Tensor, place: Tensor | None, indices: Tensor, temperature: float) -> Others:
    """Those of rows `[r, V]`; their mass is made in `place`, if there is one.

    Relative to the largest of all classes, which takes a sweep less, where a look that waits for nothing shows that
    no digit is lost.
    """
    per_bit = 1 / (LN2 * temperature)
    if on_cpu(z.device) and not torch.compiler.is_compiling():
        top = z.amax(-1, keepdim=True)
        mass = torch.sub(z, finite(top), out=place).mul_(per_bit).scatter_(-1, indices, -torch.inf).exp2_()
        total = wide_sum(mass)
        if not bool((total < ENOUGH).any()):
            return Others(mass, total, (total.log() * temperature).to(z.dtype), top)
    found = torch.scatter(z, -1, indices, -torch.inf, out=place)
    top = found.amax(-1, keepdim=True)
    mass = found.sub_(finite(top)).mul_(per_bit).exp2_()
    total = wide_sum(mass)
    return Others(mass, total, (total.log() * temperature).to(z.dtype), top)


def others_of_side(
    side: Callable[..., Side], given: Tensor, dtype: torch.dtype, indices: Tensor, temperature: Any
) -> Others:
    """The same for a compiler, by sums that a side has; what is written on the way has no more digits than `given`."""
    q = side(torch.scatter(given, -1, indices, -torch.inf).to(dtype), temperature)
    return Others(q.bits.exp2(), q.log_total.exp(), q.log_total * temperature, q.top)
