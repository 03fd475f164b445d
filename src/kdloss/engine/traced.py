"""What is compiled: the work on a few rows as a function of tensors, and what it is compiled anew for."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.kernel import Few, compute
from kdloss.engine.pieces import PiecedSide
from kdloss.engine.plan import Group, Plan
from kdloss.engine.rows import identity
from kdloss.engine.side import Side
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.reduction import widest
from kdloss.targets import TopKLogits
from kdloss.targets.kinds import Classes
from kdloss.targets.top_k import Tail, right_rows


class Kept(NamedTuple):
    """A teacher's most probable classes: their ids and log-probabilities, the temperature of these, that at which they
    are compared, and the student's classes.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None
    at: Tensor
    temperature: Tensor
    classes: Classes

    @classmethod
    def of(cls, task: TeacherTask) -> "Kept":
        """What a task brings along."""
        teacher: Any = task.teacher
        at, temperature = (_tensor(t, teacher.device) for t in (teacher.temperature, task.temperature))
        return cls(teacher.ids(), teacher.log_probs, teacher.log_rest, at, temperature, task.student_classes)

    def logits(self, tail: Tail) -> TopKLogits:
        """The same as a teacher's logits."""
        at: Any = self.at
        return right_rows(self.ids, self.log_probs, tail, at, self.log_rest, None)

    def first(self, rows: int) -> "Kept":
        """Some rows of it."""
        rest = None if self.log_rest is None else self.log_rest[:rows]
        return self._replace(ids=self.ids[:rows], log_probs=self.log_probs[:rows], log_rest=rest)


class Rows(NamedTuple):
    """What a few rows bring along: the student's logits; by task its teacher's logits or its labels, and weights of
    classes; by group its temperature and classes; by task what the slope is multiplied with and where it is off; and
    teachers of which a few classes were kept.
    """

    z: Tensor
    beside: list[Tensor | None]
    class_weights: list[Tensor | None]
    temperatures: list[Tensor | float]
    classes: list[Classes]
    weights: Tensor | None
    off: list[Tensor | None]
    nowhere: Tensor | None
    kept: list[Kept]

    @classmethod
    def of(cls, plan: Plan, few: Few) -> "Rows":
        """Those that the plan's tasks read."""
        tasks = {k: few.task(k) for group in plan.groups for k in (*group.labels, *group.closed)}
        found: list[Any] = [tasks.get(k) for k in range(len(few.off))]
        beside = [None if t is None else t.labels if isinstance(t, LabelTask) else t.teacher for t in found]
        class_weights = [t.class_weights if isinstance(t, LabelTask) else None for t in found]
        temperatures = [_passed(group.temperature, few.z.device) for group in plan.groups]
        classes = [group.classes for group in plan.groups]
        kept = [Kept.of(few.task(k)) for k in plan.top_k]
        return cls(few.z, beside, class_weights, temperatures, classes, few.weights, list(few.off), few.nowhere, kept)

    def first(self, rows: int) -> "Rows":
        """Some of them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:rows]

        beside, off = [cut(x) for x in self.beside], [cut(x) for x in self.off]
        weights = None if self.weights is None else self.weights[:, :rows]
        found = self._replace(z=self.z[:rows], beside=beside, weights=weights, off=off, nowhere=cut(self.nowhere))
        return found._replace(kept=[kept.first(rows) for kept in self.kept])

    def mark(self, out: Tensor | None) -> None:
        """Tell the compiler that there will be other numbers of rows."""
        kept = [x for k in self.kept for x in (k.ids, k.log_probs, k.log_rest)]
        for tensor in (self.z, out, self.nowhere, *self.beside, *self.off, *kept):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self.weights is not None and self.weights.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(self.weights, 1)


def compute_rows(
    groups: Sequence[Group],
    smoothing: Sequence[float | None],
    few: Mapping[int, tuple[Tail, ClosedForm]],
    dtype: torch.dtype,
    make: type[Side] | type[PiecedSide],
    rows: Rows,
    out: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Values `[k, r]` of all tasks; the gradient is written to `out`, or over the logits where that is None.

    And what is left to be written there: some classes of each row, and their numbers.
    """

    def side(logits: Tensor, temperature: Any) -> Side:
        if isinstance(temperature, float):  # a teacher's own
            return make(logits, temperature)
        if isinstance(temperature, Tensor):  # among a few classes, where term by term takes no time
            return make(logits, temperature, like=16.0)
        return make(logits, rows.temperatures[temperature], like=_like(groups[temperature].temperature))

    z = rows.z.to(dtype)
    tasks: list[Any] = [
        _Teacher(x) if smooth is None or x is None else LabelTask(x, smooth, w)
        for x, w, smooth in zip(rows.beside, rows.class_weights, smoothing, strict=True)
    ]
    for kept, (k, (tail, form)) in zip(rows.kept, few.items(), strict=True):
        tasks[k] = _Teacher(kept.logits(tail), kept.classes, kept.temperature, (form, 1.0))
    here = [Group(n, rows.classes[n], group.labels, group.closed, group.own) for n, group in enumerate(groups)]
    found = Few(z, tasks.__getitem__, rows.weights, rows.off, rows.nowhere, rows.z)
    values, gradient = compute(Plan(here, list(few)), found, side)
    if gradient is None or found.gradient is None:
        return values.to(dtype), None
    place, left = rows.z if out is None else out, found.gradient.left
    place.copy_(gradient)
    return values.to(dtype), None if left is None else (left[0], left[1].to(place.dtype))


class _Teacher(NamedTuple):
    teacher: Tensor | TopKLogits | None
    student_classes: Classes = None
    temperature: Tensor | float = 1.0
    closed_form: tuple[ClosedForm, float] | None = None


def structure(plan: Plan, tasks: Sequence[Task]) -> Hashable:
    """What is compiled in: forms and tails of the tasks, and by group which they are."""
    of_tasks = tuple(
        (t.soft, t.smoothing, t.class_weights is None) if isinstance(t, LabelTask) else _form(t) for t in tasks
    )
    groups = tuple(
        (
            _like(group.temperature),
            _which(group.classes),
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
    return temperature if temperature in (1, 2) else _tensor(temperature, device)


def _tensor(number: float, device: torch.device) -> Tensor:
    return torch.full((), number, dtype=widest(device), device=device)


def can_be_traced(plan: Plan, tasks: Sequence[Task]) -> bool:
    """Whether all tasks have forms, and these no tensors among their options, which would be compiled in."""
    forms: list[Any] = [task.closed_form for task in tasks if isinstance(task, TeacherTask)]
    if plan.by_autograd or None in forms:
        return False
    return not any(isinstance(option, Tensor) for form, _ in forms for option in form.keywords.values())


def _which(classes: Classes) -> Hashable:
    return "some" if isinstance(classes, Tensor) else identity(classes)


def _form(task: TeacherTask) -> Hashable:
    assert task.closed_form is not None
    form: Any = task.closed_form[0]
    options = tuple(sorted((name, identity(value)) for name, value in form.keywords.items()))
    few = isinstance(task.teacher, TopKLogits) and (task.teacher.tail, _which(task.student_classes))
    return form.func, options, few
