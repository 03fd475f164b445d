"""Means of terms between two lines of a log."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor


class Means:
    """Adds up terms on their device, and copies them to the host only for the log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Any] = {}

    def add(self, terms: Mapping[str, Tensor], weight: Any) -> None:
        """Add a batch's terms with a weight."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0) + weight

    def take(self) -> dict[str, float]:
        """The means over all processes (each process has to call this), and start again from 0."""
        own = {name: (float(total), float(self.weights[name])) for name, total in self.sums.items()}
        self.sums, self.weights = {}, {}
        gathered: list[dict[str, tuple[float, float]]] = gather_object([own])
        names = dict.fromkeys(name for each in gathered for name in each)
        found = {name: [each[name] for each in gathered if name in each] for name in names}
        totals = {name: (sum(x for x, _ in seen), sum(n for _, n in seen)) for name, seen in found.items()}
        return {name: total / weight if weight else 0.0 for name, (total, weight) in totals.items()}
