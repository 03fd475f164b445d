"""Print a curve as a table."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from kdloss.analysis._groups import groups
from kdloss.analysis._trend import Trend

HEAD = ["term", "values", "first", "last", "lowest", "trend"]


def table(values: Mapping[str, Sequence[float]]) -> str:
    """One line for each name, grouped by term."""
    lines = [HEAD, *(_line(name, values[name]) for there in groups(values).values() for name in there)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  " + "  ".join(f"{x:>{n}}" for x, n in zip(rest, widths[1:], strict=True))
        for name, *rest in lines
    )


def _line(name: str, values: Sequence[float]) -> list[str]:
    trend = Trend.of(values)
    last = fmean(values[-max(1, len(values) // 10) :])
    lowest = min((x for x in values if math.isfinite(x)), default=math.nan)
    numbers = [f"{x:.4g}" for x in (values[0], last, lowest)]
    return [name, str(len(values)), *numbers, trend.word if trend else "short"]
