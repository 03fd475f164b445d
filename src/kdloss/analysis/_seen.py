"""The data that the rules for symptoms read."""

from collections.abc import Iterable, Mapping, Sequence

from kdloss.analysis._groups import FACTORS
from kdloss.analysis._trend import Trend
from kdloss.terms import CrossEntropy, Features, Logits, Sum, Task

NAMES = {"ce": "labels", "task": "labels", "kd": "logits", "feature": "features"}  # default names of terms
KINDS = {CrossEntropy: "labels", Task: "labels", Logits: "logits", Features: "features"}

Numbers = Mapping[str, Sequence[float]]


class Seen:
    """A curve with the kinds, weights and trends of its terms."""

    def __init__(self, steps: Numbers, values: Numbers, criterion: Sum | None) -> None:
        self.steps, self.values = steps, values
        self.trends = {name: trend for name, x in values.items() if (trend := Trend.of(x))}
        terms = {} if criterion is None else dict(criterion.terms.items())
        kinds = {name: kind for name, term in terms.items() for of, kind in KINDS.items() if isinstance(term, of)}
        self.kinds = NAMES if criterion is None else kinds
        self.scheduled = {name for name, term in terms.items() if term.scheduled}
        self.weights = {} if criterion is None else _weights(criterion)
        ends = [(at[0], at[-1]) for at in steps.values()]
        self.late = bool(ends) and min(first for first, _ in ends) > 0.1 * max(last for _, last in ends)

    def of(self, *kinds: str) -> dict[str, Trend]:
        """The trends of the terms of these kinds."""
        return {name: self.trends[name] for name, kind in self.kinds.items() if kind in kinds and name in self.trends}

    def from_the_start(self, kind: str) -> Iterable[tuple[str, Trend]]:
        """The terms of a kind and their trends; empty for a resumed run, which may have learned everything before."""
        return () if self.late else self.of(kind).items()

    def learned(self, *kinds: str) -> dict[str, float]:
        """The fall of each term of these kinds, less two standard errors, if it is more than 5 %."""
        return {name: trend.sure for name, trend in self.of(*kinds).items() if trend.sure > 0.05}

    def layers(self, term: str) -> dict[str, Trend]:
        """The trends of a term's layers, by name."""
        names = ((name, name.partition("/")[2]) for name in self.trends if name.startswith(f"{term}/"))
        return {layer: self.trends[name] for name, layer in names if layer not in FACTORS}

    def sizes(self) -> dict[str, tuple[float, float]]:
        """The weighted contribution of each term to the loss, in the first and in the last tenth of the steps."""
        found = {}
        for name, weight in self.weights.items():
            if weight and name in self.trends:
                trend, factor = self.trends[name], self.trends.get(f"{name}/balance")
                first, last = (factor.first, factor.last) if factor else (1.0, 1.0)
                found[name] = weight * first * abs(trend.first), weight * last * abs(trend.last)
        return found


def _weights(criterion: Sum) -> dict[str, float]:
    return {name: float(weight.at(criterion.step)) for name, weight in criterion.weights.items()}
