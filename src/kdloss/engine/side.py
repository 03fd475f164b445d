"""One side of a divergence: the softmax of a few rows, in scratch that closed forms overwrite."""

import math

import torch
from torch import Tensor

from kdloss.engine.terms import NO_MASS
from kdloss.reduction import widest
from kdloss.targets import Shard

LOG2_E = math.log2(math.e)


class Side:
    r"""$x = (z - \max z)/T$, $e = \exp x$, and $\log\sum e$, rows `[r, V]` in float32 or better."""

    def __init__(self, logits: Tensor, temperature: float, x: Tensor, e: Tensor, shard: Shard | None = None) -> None:
        self.x, self.e, self.shard, self.temperature = x, e, shard, temperature
        some = bool(logits.shape[-1])
        top = logits.amax(-1, keepdim=True).to(x.dtype) if some else x.new_full((len(x), 1), -torch.inf)
        top = top if shard is None else shard.max(top)
        self.top = top.masked_fill_(top == -torch.inf, 0)
        shifted(logits, self.top, x)
        if temperature != 1:
            x.div_(temperature)
        exp(x, e)
        # The small differences of large sums that a divergence is need more digits than float32 has.
        self.total = self.sum(e)
        self.log_total = self.total.log()

    def sum(self, rows: Tensor) -> Tensor:
        """Sums over all classes, in float64 where there is one."""
        total = rows.sum(-1, keepdim=True, dtype=widest(rows.device))
        return total if self.shard is None else self.shard.sum(total)

    def log_ratio_to(self, other: "Side") -> Tensor:
        """log(self / other) where both are normalised, as a number to add to x - other.x."""
        return (other.log_total - self.log_total).to(self.x.dtype)

    def normalise(self) -> Tensor:
        """Make e the probabilities."""
        return self.e.div_(self.total.to(self.e.dtype))

    @property
    def flat(self) -> bool:
        """Whether T² multiplies the rounding of sums over nearly equal terms beyond what is promised."""
        return self.temperature > 8

    def smooth(self) -> "Side":
        """Give classes without mass a negligible one, so that every ratio and logarithm is finite."""
        self.x.clamp_(min=NO_MASS)
        self.e.clamp_(min=math.exp(NO_MASS))
        return self


def shifted(logits: Tensor, top: Tensor, out: Tensor) -> Tensor:
    """The logits minus each row's largest, in out's dtype."""
    if logits.dtype == out.dtype:
        return torch.sub(logits, top, out=out)
    return out.copy_(logits).sub_(top)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """Exp by way of exp2, several times faster on CPUs."""
    return torch.mul(x, LOG2_E, out=out).exp2_()
