"""What is compiled: the work on a few rows as a function of tensors, and what it is compiled anew for."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.kernel import Few, compute
from kdloss.engine.pieces import PiecedSide
from kdloss.engine.plan import Group, Plan
from kdloss.engine.rows import identity
from kdloss.engine.side import Side
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.reduction import widest
from kdloss.targets.kinds import Classes


class Rows(NamedTuple):
    """What a few rows bring along: the student's logits; by task its teacher's logits or its labels, and weights of
    classes; by group its temperature and classes; by task what the slope is multiplied with and where it is off.
    """

    z: Tensor
    beside: list[Tensor | None]
    class_weights: list[Tensor | None]
    temperatures: list[Tensor | float]
    classes: list[Classes]
    weights: Tensor | None
    off: list[Tensor | None]
    nowhere: Tensor | None

    @classmethod
    def of(cls, plan: Plan, few: Few) -> "Rows":
        """Those that the plan's tasks read."""
        tasks = {k: few.task(k) for group in plan.groups for k in (*group.labels, *group.closed)}
        found: list[Any] = [tasks.get(k) for k in range(len(few.off))]
        beside = [None if t is None else t.labels if isinstance(t, LabelTask) else t.teacher for t in found]
        class_weights = [t.class_weights if isinstance(t, LabelTask) else None for t in found]
        temperatures = [_passed(group.temperature, few.z.device) for group in plan.groups]
        classes = [group.classes for group in plan.groups]
        return cls(few.z, beside, class_weights, temperatures, classes, few.weights, list(few.off), few.nowhere)

    def first(self, rows: int) -> "Rows":
        """Some of them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:rows]

        beside, off = [cut(x) for x in self.beside], [cut(x) for x in self.off]
        weights = None if self.weights is None else self.weights[:, :rows]
        return self._replace(z=self.z[:rows], beside=beside, weights=weights, off=off, nowhere=cut(self.nowhere))

    def mark(self, out: Tensor | None) -> None:
        """Tell the compiler that there will be other numbers of rows."""
        for tensor in (self.z, out, self.nowhere, *self.beside, *self.off):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self.weights is not None and self.weights.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(self.weights, 1)


def compute_rows(
    groups: Sequence[Group],
    smoothing: Sequence[float | None],
    dtype: torch.dtype,
    make: type[Side] | type[PiecedSide],
    rows: Rows,
    out: Tensor | None,
) -> Tensor:
    """Values `[k, r]` of all tasks; the gradient is written to `out`, or over the logits where that is None."""

    def side(logits: Tensor, temperature: Any) -> Side:
        if isinstance(temperature, float):  # a teacher's own
            return make(logits, temperature)
        return make(logits, rows.temperatures[temperature], like=_like(groups[temperature].temperature))

    z = rows.z.to(dtype)
    tasks: list[Any] = [
        _Teacher(x) if smooth is None or x is None else LabelTask(x, smooth, w)
        for x, w, smooth in zip(rows.beside, rows.class_weights, smoothing, strict=True)
    ]
    here = [Group(n, rows.classes[n], group.labels, group.closed, group.own) for n, group in enumerate(groups)]
    values, gradient = compute(Plan(here), Few(z, tasks.__getitem__, rows.weights, rows.off, rows.nowhere), side)
    if gradient is not None:
        (rows.z if out is None else out).copy_(gradient)
    return values.to(dtype)


class _Teacher(NamedTuple):
    teacher: Tensor | None


def structure(plan: Plan, tasks: Sequence[Task]) -> Hashable:
    """What is compiled in: by group the tasks and forms."""
    of_tasks = tuple(
        (t.soft, t.smoothing, t.class_weights is None) if isinstance(t, LabelTask) else _form(t) for t in tasks
    )
    groups = tuple(
        (
            _like(group.temperature),
            "some" if isinstance(group.classes, Tensor) else identity(group.classes),
            tuple(group.labels),
            tuple((teacher, tuple(c.k for c in closed)) for teacher, closed in group.closed.items()),
            tuple(group.own.items()),
        )
        for group in plan.groups
    )
    return of_tasks, groups


def _like(temperature: float) -> float:
    """Temperatures with a way of their own are 1, 2 and those above 8; the others are computed alike."""
    return temperature if temperature in (1, 2) else 16.0 if temperature > 8 else 4.0


def _passed(temperature: float, device: torch.device) -> float | Tensor:
    """A number that may change from step to step, without being compiled anew."""
    return temperature if temperature in (1, 2) else torch.full((), temperature, dtype=widest(device), device=device)


def by_tensors(group: Group) -> bool:
    """Whether a form has tensors among its options, which would be compiled in."""
    forms: list[Any] = [c.form for closed in group.closed.values() for c in closed]
    return any(isinstance(option, Tensor) for form in forms for option in form.keywords.values())


def _form(task: TeacherTask) -> Hashable:
    assert task.closed_form is not None
    form: Any = task.closed_form[0]
    return form.func, tuple(sorted((name, identity(value)) for name, value in form.keywords.items()))
