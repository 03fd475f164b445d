"""Whether noisy values fall, beyond chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

LEAST = 50  # values: five in each tenth, the least to estimate a variance from
SURE = 2  # standard errors: one stationary term in forty seems to move
HIGH = 3  # standard deviations of the first values above the last: one noisy term in seven hundred exceeds it


@dataclass(frozen=True)
class Trend:
    """The change from the mean of the first tenth of the values to the mean of the last tenth.

    `fall` is the difference, and `error` its standard error, from the variance within both tenths. `drop` is how far
    the first value, or the mean of the first five, is above the last tenth, or 0 if that may be chance: it detects
    terms that converge within the first tenth. All three are relative to the larger mean.
    """

    first: float
    last: float
    fall: float
    error: float
    drop: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Trend | None":
        """The trend of the finite values; None for fewer than 50."""
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
        """The fall of the means, less two standard errors."""
        return self.fall - SURE * self.error

    def rose_by(self, share: float) -> bool:
        """Whether the means rose by more than this share, beyond two standard errors and without an early drop."""
        return -self.fall - SURE * self.error > share and not self.drop

    def fell_less_than(self, share: float) -> bool:
        """Whether the values neither fell nor dropped by this share. False if noise could hide such a fall."""
        return self.fall + SURE * self.error < share and self.drop < share

    @property
    def word(self) -> str:
        """falls, rises, stays, or unclear if noise hides it. Over 1 % is a move; surely below 5 % is none."""
        if max(self.sure, self.drop) > 0.01:
            return "falls"
        if self.rose_by(0.01):
            return "rises"
        return "stays" if abs(self.fall) + SURE * self.error < 0.05 else "unclear"
