"""Compare rows with a teacher of which only the k most probable classes were kept."""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.once import behind
from kdloss.engine.side import LN2, Side, finite, wide_sum
from kdloss.reduction import on_cpu
from kdloss.targets import TopKLogits
from kdloss.targets.few_classes import base, filled, logits, says_nothing, slots

LEAST, MOST = 2.0**-40, 2.0**20
"""Between these bounds a mass, relative to the largest exponential of the kept classes, has full float32 precision."""
AmongFew = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Student's and teacher's logits of a few classes `[r, k + 1]` -> values `[r, 1]` and, if wanted, their slopes."""


class TopK(NamedTuple):
    """Values `[r, 1]`, and the gradient: `slope` at the kept `classes`, and `share` times the mass of the `others`."""

    value: Tensor
    others: Tensor | None
    share: Tensor
    classes: Tensor
    slope: Tensor | None


class Others(NamedTuple):
    """The classes that were not kept: their mass, its sum (1 in place of 0), and its logarithm as a logit.

    The logit `size` is relative to `low` `[r, 1]`; the caller takes the logits of the kept classes relative to it, too.
    """

    mass: Tensor
    total: Tensor
    size: Tensor
    low: Tensor


def among_few(
    compare: AmongFew, rest: Callable[..., Others], z: Tensor, teacher: TopKLogits, dtype: torch.dtype
) -> TopK:
    """Compare the k classes and a bucket, at the temperature at which the teacher's were kept, in a `dtype`.

    The bucket's gradient is distributed to the student's logits in it by their share of its mass.
    """
    indices, empty = slots(teacher)
    nothing, k = says_nothing(empty), indices.shape[-1]
    at = z.gather(-1, indices)
    if teacher.tail == "renormalise":
        kept, others = filled(at, empty, -torch.inf), None
        few = kept - base(kept)
    else:
        others = rest(at, indices, teacher.temperature)
        few = torch.cat([filled(at - others.low, empty, -torch.inf), others.size], -1)
    few, theirs = filled(few.to(dtype), nothing, 0.0), logits(teacher, empty, z.shape[-1]).to(dtype)
    value, slope = compare(behind(few), behind(theirs))
    value = filled(value, nothing, 0.0)
    if slope is None:
        return TopK(value, None, value, indices, None)
    slope = behind(slope)
    slope_at = filled(slope[:, :k], empty, 0.0)
    if others is None:
        return TopK(value, None, value, indices, slope_at)
    return TopK(value, others.mass, slope[:, k:] / others.total, indices, slope_at)


def others_in_place(z: Tensor, place: Tensor | None, at: Tensor, indices: Tensor, temperature: float) -> Others:
    """The other classes of rows `[r, V]`; `at` are the logits of the kept ones. Their mass is in `place`, if given.

    On a CPU the mass is taken relative to the largest of the kept classes, which saves a sweep, if a test shows that
    no digit is lost. Otherwise it is relative to their own largest, since beside the kept classes it may underflow.
    """
    per_bit = 1 / (LN2 * temperature)
    if on_cpu(z.device) and not torch.compiler.is_compiling():
        low = finite(at.amax(-1, keepdim=True))
        bits, off = bits_above(z, low, per_bit, place)
        mass = bits.scatter_(-1, indices, -torch.inf).exp2_()
        total = wide_sum(mass)
        least, most = total.aminmax()
        if least.item() >= LEAST and most.item() <= MOST:
            return Others(mass, total, (total.log2() - off) / per_bit, low)
    found = torch.scatter(z, -1, indices, -torch.inf, out=place)
    top = finite(found.amax(-1, keepdim=True))
    mass = found.sub_(top).mul_(per_bit).exp2_()
    total = wide_sum(mass)
    return _beside(at, mass, total, total.log(), top, temperature)


def others_of_side(
    side: Callable[..., Side], given: Tensor, dtype: torch.dtype, at: Tensor, indices: Tensor, temperature: Any
) -> Others:
    """The same for a compiler, from a side's sums; the intermediate tensor has the dtype of `given`."""
    q = side(torch.scatter(given, -1, indices, -torch.inf).to(dtype), temperature)
    return _beside(at, q.bits.exp2(), q.log_total.exp(), q.log_total, q.top, temperature)


def _beside(at: Tensor, mass: Tensor, total: Tensor, log_total: Tensor, top: Tensor, temperature: Any) -> Others:
    """`Others` from a mass relative to `top`, brought to the base they share with the kept classes."""
    low = base(at, top)
    return Others(mass, total.masked_fill(total == 0, 1), log_total * temperature + (top - low), low)


def bits_above(z: Tensor, low: Tensor, per_bit: float, place: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """(z - low) times a number, and a correction that is the same for all classes of a row.

    One sweep, where PyTorch rounds a product and a sum once; the correction is the rounding of low times the number.
    """
    if z.dtype != torch.float32 or not rounds_once():
        return torch.sub(z, low, out=place).mul_(per_bit), 0.0
    (per_bit,) = struct.unpack("f", struct.pack("f", per_bit))  # the float32 number that torch.add uses
    start = low * -per_bit
    return torch.add(start, z, alpha=per_bit, out=place), start.double().add_(low.double(), alpha=per_bit)


@cache
def rounds_once() -> bool:
    """Whether PyTorch rounds a product and a sum once on this CPU. Large numbers that cancel need that."""
    x = torch.full((1, 67), 1 + 2.0**-12, dtype=torch.float32, device="cpu")
    return bool(torch.add(-x * x, x, alpha=1 + 2.0**-12).all())
