"""The loss terms of a training over its steps."""

from collections.abc import Mapping
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from kdloss.analysis._picture import draw
from kdloss.analysis._table import table
from kdloss.analysis.symptoms import Symptom, find
from kdloss.reduction import widest
from kdloss.terms import Sum

MOST = 2000  # points: more than a picture shows


class Curve:
    """Record the loss terms of a training, draw them and detect common problems.

    Call `add(out.components)` in the loop, once a step. It does not wait for the device: tensors are read only when
    you ask for values. Any mapping of names to numbers works, for example `criterion.components` or a line of a
    Trainer's `log_history`. At most 2000 points are kept; beyond that, neighbouring points are averaged, except the
    first. With several processes each one records its own batches.

    `print(curve)` shows for each name the first value, the last one (the mean of the last tenth), the lowest and the
    trend. The trend is "unclear" if noise hides it, and "short" with fewer than 50 values. A pickle contains only
    numbers.

    >>> curve = Curve()
    >>> for step in range(100):
    ...     curve.add({"ce": 2.0 + 1 / (1 + step), "kd": torch.tensor(0.5)})
    >>> print(curve)
    term  values  first  last  lowest  trend
    ce       100      3  2.01    2.01  falls
    kd       100    0.5   0.5     0.5  stays
    >>> [symptom.text for symptom in curve.symptoms()]
    ['kd hardly falls, from 0.5 to 0.5']
    """

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._width = 1  # steps per point

    def add(self, numbers: Mapping[str, Any], step: int | None = None) -> None:
        """Record the `numbers` of a step: `out.components`, or any mapping of names to numbers.

        `step` is by default the one after the last. Give it where a run resumes, as `criterion.step`. If you add to a
        step several times, as with micro-batches, it keeps the mean. A step before the last one means that the run went
        back to it: everything recorded from that step on is dropped.

        Raises: TypeError for a value that is not a number.
        """
        sums = {name: _number(name, value) for name, value in numbers.items()}
        last = self._points[-1].last if self._points else -1
        step = last + 1 if step is None else index(step)
        if step < last:
            self._points = [point for point in self._points if point.last < step]
        at = self._points[-1] if self._points else None
        if at is None or (step > at.last and (at.steps >= self._width or len(self._points) == 1)):
            self._points.append(at := _Point(step))
        at.add(sums, dict.fromkeys(sums, 1), step, int(step > at.last))
        if len(self._points) > MOST:
            self._width *= 2
            for point, other in zip(self._points[1::2], self._points[2::2], strict=False):
                point.add(other.sums, other.counts, other.last, other.steps)
            self._points[1:] = self._points[1::2]

    @property
    def values(self) -> dict[str, list[float]]:
        """The values of each name so far: `values["kd"]`."""
        found: dict[str, list[float]] = {}
        for point in self._read():
            for name, total in point.sums.items():
                found.setdefault(name, []).append(total / point.counts[name])
        return found

    @property
    def steps(self) -> dict[str, list[float]]:
        """The step of each entry of `values`; for an average, the step in the middle."""
        found: dict[str, list[float]] = {}
        for point in self._points:
            for name in point.sums:
                found.setdefault(name, []).append((point.first + point.last) / 2)
        return found

    def symptoms(self, criterion: Sum | None = None, teacher_loss: float | None = None) -> list[Symptom]:
        """Find common problems, each with likely causes and what to do. Differences that noise can explain are ignored.

        - `criterion`: gives the kind and the weight of each term. Without it the default names "ce", "task", "kd" and
          "feature" are assumed, and no weights are known.
        - `teacher_loss`: the teacher's own cross-entropy, measured once on similar data: `teacher(**batch).loss`.

        Trends need at least 50 values of a term. The guide lists the rules with their thresholds.

        Raises: TypeError for a `criterion` that is not a `kdloss.Sum`.
        """
        if criterion is not None and not isinstance(criterion, Sum):
            what = type(criterion).__name__
            raise TypeError(f"the criterion is the kdloss.Sum that was trained, got {what}; write model.criterion")
        return find(self.steps, self.values, criterion, None if teacher_loss is None else float(teacher_loss))

    def draw(self, target: Any) -> None:
        """Draw all terms on a `target`: a matplotlib figure, or the path of a file to write.

        The terms are in the first panel. The layers of each term, and its factors, have panels of their own.

        Raises: ImportError without matplotlib (`pip install 'kdloss[plot]'`).
        """
        draw(self.steps, self.values, target)

    def _read(self) -> "list[_Point]":
        """The points, with tensors read as numbers. It waits once for each device."""
        waiting: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
        for point in self._points:
            for name, total in point.sums.items():
                if isinstance(total, Tensor):
                    waiting.setdefault(total.device, []).append((point.sums, name))
        for places in waiting.values():
            numbers = torch.stack([sums[name] for sums, name in places]).tolist()
            for (sums, name), number in zip(places, numbers, strict=True):
                sums[name] = number
        return self._points

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        return vars(self)

    def __str__(self) -> str:
        return table(self.values)


class _Point:
    """One or more steps: the sum and the count of each number."""

    def __init__(self, step: int) -> None:
        self.first, self.last, self.steps = step, step - 1, 0
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, sums: Mapping[str, Any], counts: Mapping[str, int], last: int, steps: int) -> None:
        self.last, self.steps = last, self.steps + steps
        for name, total in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total  # a new tensor: the caller may write to the old one
            self.counts[name] = self.counts.get(name, 0) + counts[name]


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(widest(value.device))
    if isinstance(value, Real):
        return float(value)
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"a curve follows numbers by name, and {name!r} is {what}; write curve.add(out.components)")
