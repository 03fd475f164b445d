"""Draw a curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kdloss.analysis._groups import groups
from kdloss.analysis._matplotlib import matplotlib


def draw(steps: Mapping[str, Sequence[float]], values: Mapping[str, Sequence[float]], target: Any) -> None:
    """Draw one panel for the terms and one for each other group of names."""
    panels = groups(values)
    if isinstance(target, (str, Path)):
        figure = matplotlib("figure", "a picture of a curve").Figure((7, 3 * max(1, len(panels))), layout="constrained")
        draw(steps, values, figure)
        figure.savefig(target, dpi=150)
        return
    axes = target.subplots(max(1, len(panels)), squeeze=False, sharex=True)[:, 0]
    for each, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            (line,) = each.plot(steps[name], values[name], linewidth=0.8, alpha=0.35)
            each.plot(steps[name], _smooth(values[name]), color=line.get_color(), label=name.removeprefix(f"{title}/"))
        each.set(ylabel=title, yscale="log" if all(x > 0 for name in names for x in values[name]) else "linear")
        each.legend(fontsize="small", ncols=1 + len(names) // 12)
    axes[-1].set_xlabel("step")


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over a fortieth of all values to each side."""
    reach = len(values) // 40
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
