"""One side of a divergence: the softmax of a few rows, which is only read once it is made."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdloss.engine.terms import NO_MASS
from kdloss.reduction import precise, widest
from kdloss.targets.sharded import Shard

LN2 = math.log(2)
NO_BITS = NO_MASS / LN2
New = Callable[[], Tensor | None]
"""Hands out a buffer `[r, V]` to write a result to, or None: then PyTorch makes one."""


class Side:
    r"""Rows `[r, V]` at a temperature: $b = (z - \max z) / (T \ln 2)$, and the probabilities $2^b / \sum 2^b$;
    or, if not to be normalised, $2^b$, of which `total` is the sum then.

    In bits, as exp2 is computed three times faster than exp on CPUs; logarithms that leave are natural ones.
    """

    def __init__(
        self, logits: Tensor, temperature: float, new: New, shard: Shard | None = None, normalise: bool = True
    ) -> None:
        self.temperature, self.shard = temperature, shard
        out = new()
        dtype = precise(logits).dtype if out is None else out.dtype
        if logits.shape[-1]:
            top = logits.amax(-1, keepdim=True).to(dtype)
        else:  # a process without any class
            top = torch.full((len(logits), 1), -torch.inf, dtype=dtype, device=logits.device)
        top = top if shard is None else shard.max(top)
        self.top = top.masked_fill(top == -torch.inf, 0)
        # The largest leaves before the division, which then rounds small numbers, not large ones.
        if logits.dtype == dtype:
            shifted = torch.sub(logits, self.top, out=out)
        else:
            shifted = (logits.to(dtype) if out is None else out.copy_(logits)).sub_(self.top)
        self.bits = shifted.mul_(1 / (LN2 * temperature))
        probs = torch.exp2(self.bits, out=new())
        # The small differences of large sums that a divergence is need more digits than float32 has.
        total = self.sum(probs)
        self.log_total = total.log()
        self.probs = probs.div_(total.to(dtype)) if normalise else probs
        self.total = torch.ones_like(total) if normalise else total

    def sum(self, rows: Tensor) -> Tensor:
        """Sums over all classes, in float64 where there is one."""
        total = rows.sum(-1, keepdim=True, dtype=widest(rows.device))
        return total if self.shard is None else self.shard.sum(total)

    def log_ratio_to(self, other: "Side", out: Tensor | None, smooth: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """log(self / other) of the probabilities, NaN where both are 0; of smooth bits of both, if given."""
        mine, others = smooth or (self.bits, other.bits)
        gap = torch.sub(mine, others, out=out)
        return torch.add((other.log_total - self.log_total).to(gap.dtype), gap, alpha=LN2, out=out)

    def log_probs(self) -> Tensor:
        """Natural logarithms of the probabilities, in memory of their own."""
        return self.bits * LN2 - self.log_total.to(self.bits.dtype)

    @property
    def flat(self) -> bool:
        """Whether T² multiplies the rounding of sums over nearly equal terms beyond what is promised."""
        return self.temperature > 8

    def smooth(self, out: Tensor | None) -> Tensor:
        """Probabilities of which none is 0, so that every ratio and logarithm is finite."""
        return torch.clamp(self.probs, min=math.exp(NO_MASS), out=out)
