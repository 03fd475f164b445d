"""Whether numbers with noise fall, told apart from chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

LEAST = 50  # values: five in each tenth, below which a scatter isn't known
SURE = 2  # standard errors: one stationary term in forty looks as if it moved
HIGH = 3  # standard deviations that the first values stand above the last: one noisy term in seven hundred does


@dataclass(frozen=True)
class Trend:
    """From the mean of the first tenth of some values to the mean of the last.

    `fall` is the difference and `error` its standard error, by the scatter within both tenths. `drop` is how far the
    first value, or the mean of the first five, stands above the last tenth where that is no chance, else 0: what has
    converged within the first tenth has fallen, too. All three are shares of the larger side.
    """

    first: float
    last: float
    fall: float
    error: float
    drop: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Trend | None":
        """That of the values which are finite; None for fewer than 50."""
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < LEAST:
            return None
        n = len(finite) // 10
        start, end = finite[:n], finite[-n:]
        first, last, scatter = fmean(start), fmean(end), variance(end)
        size = max(abs(first), abs(last)) or 1.0
        error = math.sqrt((variance(start) + scatter) / n)
        drops = [(k, fmean(finite[:k]) - last) for k in (1, 5)]
        high = [drop / max(abs(drop + last), abs(last)) for k, drop in drops if drop > HIGH * math.sqrt(scatter / k)]
        return cls(first, last, (first - last) / size, error / size, max(high, default=0.0))

    @property
    def sure(self) -> float:
        """By how much the means surely fell."""
        return self.fall - SURE * self.error

    def rose_by(self, share: float) -> bool:
        """Whether the means surely rose by more than this share, with no drop before."""
        return -self.fall - SURE * self.error > share and not self.drop

    def fell_less_than(self, share: float) -> bool:
        """Whether it surely did not fall by this share, nor drop; false also where noise would hide such a fall."""
        return self.fall + SURE * self.error < share and self.drop < share

    @property
    def word(self) -> str:
        """falls, rises, stays, or unclear where noise hides it; 1 % is a move, below 5 % is none."""
        if max(self.sure, self.drop) > 0.01:
            return "falls"
        if self.rose_by(0.01):
            return "rises"
        return "stays" if abs(self.fall) + SURE * self.error < 0.05 else "unclear"
