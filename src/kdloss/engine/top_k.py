"""Rows against a teacher of which the k most probable classes were kept."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss.engine.side import LN2, finite, wide_sum
from kdloss.reduction import on_cpu
from kdloss.targets import TopKLogits
from kdloss.targets.few_classes import base, logits, slots

ENOUGH = 2.0**-40
"""The least mass, in exponentials of which the largest is 1, whose logarithm is as exact as float32 can say it."""
AmongFew = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Student's and teacher's logits of a few classes `[r, k + 1]` -> values `[r, 1]` and, if wanted, their gradient."""


class TopK(NamedTuple):
    """Values `[r, 1]`, and the gradient: `slope` at `classes`, and `share` of what the `others` have."""

    value: Tensor
    others: Tensor | None
    share: Tensor
    classes: Tensor
    slope: Tensor | None


def among_few(compare: AmongFew, z: Tensor, teacher: TopKLogits, place: Tensor | None = None) -> TopK:
    """Compared among the k classes and a bucket, at the temperature the teacher's were kept at.

    In the student's logits the bucket's gradient goes to the classes in it by their share of its mass; that of the
    others is made in `place`, if there is one.
    """
    indices, empty = slots(teacher)
    nothing = empty.all(-1, keepdim=True)
    kept = z.gather(-1, indices).masked_fill(empty, -torch.inf)
    if teacher.tail == "renormalise":
        few, mass, others = kept - base(kept), None, None
    else:
        others, mass, size, top = _others(z, indices, teacher.temperature, place)
        low = base(kept, top)
        few = torch.cat([kept - low, size + (finite(top) - low)], -1)
    value, slope = compare(few.masked_fill(nothing, 0), logits(teacher, empty, z.shape[-1]).to(few.dtype))
    value, k = value.masked_fill(nothing, 0), indices.shape[-1]
    if slope is None:
        return TopK(value, others, value, indices, None)
    share = value * 0 if mass is None else slope[:, k:] / mass.masked_fill(mass == 0, 1)
    return TopK(value, others, share, indices, slope[:, :k].masked_fill(empty | nothing, 0))


def _others(
    z: Tensor, indices: Tensor, temperature: float, place: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The classes that were not kept: their mass, its sum, its logarithm as a logit, and what they are relative to.

    That is their own largest, as beside the classes kept they may be too small for a number; or the largest of all,
    which takes a sweep less, where a look that waits for nothing shows that they aren't.
    """
    per_bit = 1 / (LN2 * temperature)
    if on_cpu(z.device) and not torch.compiler.is_compiling():
        top = z.amax(-1, keepdim=True)
        mass = torch.sub(z, finite(top), out=place).mul_(per_bit).scatter_(-1, indices, -torch.inf).exp2_()
        total = wide_sum(mass)
        if not bool((total < ENOUGH).any()):
            return mass, total, (total.log() * temperature).to(z.dtype), top
    others = torch.scatter(z, -1, indices, -torch.inf, out=place)
    top = others.amax(-1, keepdim=True)
    mass = others.sub_(finite(top)).mul_(per_bit).exp2_()
    total = wide_sum(mass)
    return mass, total, (total.log() * temperature).to(z.dtype), top
