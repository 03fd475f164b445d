"""One side of a divergence: the softmax of a block of rows. It isn't changed after it was computed."""

import math
from functools import cached_property

import torch
from torch import Tensor

from kdloss.engine.once import once
from kdloss.engine.terms import NO_MASS, kl_terms
from kdloss.reduction import widest
from kdloss.targets.sharded import Shard

LN2 = math.log(2)
PIECE = 128
"""How many numbers are added in their own dtype: a sum of so few is as precise as each of them."""


_BY_ROW = ("logits", "top", "bits", "probs", "log_total")


class Side:
    r"""Rows `[r, V]` of logits at a temperature: $b = (z - \max z) / (T \ln 2)$, and the probabilities
    $2^b / \sum 2^b$.

    The exponents are in bits, since exp2 is three times faster than exp on CPUs; returned logarithms are natural ones.
    Where the temperature is a tensor, the code path is that of the temperature `like`. Bits that are read before the
    probabilities are kept. Otherwise the probabilities overwrite them, and reading them later computes them again.
    """

    pieced = exact = False

    def __init__(
        self, logits: Tensor, temperature: float | Tensor, shard: Shard | None = None, like: float | None = None
    ) -> None:
        self.logits, self.temperature, self.shard = logits, temperature, shard
        self.like = temperature if like is None else like
        here = (
            logits if logits.shape[-1] else logits.new_full((len(logits), 1), -torch.inf)
        )  # this process has no class
        top = here.amax(-1, keepdim=True)
        self.top = finite(top if shard is None else shard.max(top))

    @cached_property
    def bits(self) -> Tensor:
        """The logits in bits, relative to the largest of the row."""
        return self._bits()

    @cached_property
    def probs(self) -> Tensor:
        """The probabilities."""
        return self._probs_and_total[0]

    @cached_property
    def log_total(self) -> Tensor:
        """The logarithm of the sum of a row's exponentials, `[r, 1]`."""
        return self._probs_and_total[1].log()

    @cached_property
    def _probs_and_total(self) -> tuple[Tensor, Tensor]:
        mass = self.bits.exp2() if "bits" in vars(self) else self._bits().exp2_()
        # A divergence is a small difference of large sums, which needs more digits than float32 has.
        total = self.sum(mass)
        return mass.mul_(total.reciprocal().to(mass.dtype)), total

    def _bits(self) -> Tensor:
        # The largest is subtracted before the division, which then rounds small numbers, not large ones.
        return (self.logits - self.top).mul_(1 / (LN2 * self.temperature))

    def sum(self, rows: Tensor) -> Tensor:
        """Sums over all classes `[r, 1]`, in float64 where the device has it."""
        total = wide_sum(rows)
        return total if self.shard is None else self.shard.sum(total)

    def kl(self, other: "Side") -> Tensor:
        """KL(self || other): the mean gap of the logits under self's probabilities, plus that of the log sums."""
        if self.flat or other.flat:
            return self.sum(kl_terms(self.probs, other.probs, other.log_ratio_to(self)))
        terms = (self.bits - other.bits).mul_(self.probs).nan_to_num_(0.0, posinf=torch.inf)
        return (other.log_total - self.log_total).add_(self.sum(terms), alpha=LN2)

    def log_ratio_to(self, other: "Side") -> Tensor:
        """log(self / other) of the probabilities, NaN where both are 0."""
        gap = self.bits - other.bits
        return gap.mul_(LN2).add_(once((other.log_total - self.log_total).to(gap.dtype)))

    def log_probs(self) -> Tensor:
        """Natural logarithms of the probabilities, in new memory."""
        return self.bits * LN2 - once(self.log_total.to(self.bits.dtype))

    def unsoftened(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised probabilities at T = 1, their sum, and the log of the sum of exponentials."""
        if self.like == 1:
            return self.probs, torch.ones_like(self.log_total), self.log_total
        if self.like == 2:
            e = self.probs.square()
            total = self.sum(e)
            return e, total, total.log().add_(self.log_total, alpha=2)
        e = (self.bits * self.temperature).exp2_()
        total = self.sum(e)
        return e, total, total.log()

    def carefully(self, rows: Tensor) -> "Side":
        """Some rows as a side that is compared term by term, as at a high temperature."""
        some = object.__new__(Side)
        vars(some).update(vars(self), like=torch.inf, **{name: getattr(self, name)[rows] for name in _BY_ROW})
        return some

    @property
    def flat(self) -> bool:
        """Whether T is so high that sums of nearly equal terms lose too many digits: T² multiplies their rounding."""
        return bool(self.like > 8)

    def smooth(self) -> Tensor:
        """The probabilities, at least e^-80, so that every ratio and logarithm is finite."""
        return self.probs.clamp(min=math.exp(NO_MASS))


class ExactSide(Side):
    """A `Side` in float64 of logits in a smaller dtype: small differences of sums lose no digits of the logits."""

    exact = True


def finite(top: Tensor) -> Tensor:
    """The largest logits, made finite where all are -inf, so that logits can be taken relative to them."""
    return top.clamp_min(torch.finfo(top.dtype).min)


def wide_sum(rows: Tensor) -> Tensor:
    """Sums over the last dimension, `[..., 1]`: pieces of 128 in their own dtype, then the pieces in float64."""
    if rows.dtype == torch.float64:
        return rows.sum(-1, keepdim=True)
    wide, classes = widest(rows.device), rows.shape[-1]
    rest = classes % PIECE
    if rows.dtype == wide or rest == classes:
        return rows.to(wide).sum(-1, keepdim=True)
    total = rows.unfold(-1, PIECE, PIECE).sum(-1).sum(-1, keepdim=True, dtype=wide)
    return total + rows[..., classes - rest :].sum(-1, keepdim=True) if rest else total
