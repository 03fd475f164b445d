"""What is compiled: the work on a block of rows as a function of tensors, and the key that needs a new compilation."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.kernel import RowBlock, compute
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
    """A top-k teacher: ids and log-probabilities of the kept classes, and the temperature `at` which they were kept.

    Also the temperature of the comparison, and which of the student's classes it is over.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None
    at: Tensor
    temperature: Tensor
    classes: Classes

    @classmethod
    def of(cls, task: TeacherTask) -> "Kept":
        """The top-k teacher of a task."""
        teacher: Any = task.teacher
        at, temperature = (_tensor(t, teacher.device) for t in (teacher.temperature, task.temperature))
        return cls(teacher.ids(), teacher.log_probs, teacher.log_rest, at, temperature, task.student_classes)

    def logits(self, tail: Tail) -> TopKLogits:
        """The teacher as `TopKLogits`."""
        at: Any = self.at
        return right_rows(self.ids, self.log_probs, tail, at, self.log_rest, None)

    def first(self, rows: int) -> "Kept":
        """The first `rows` rows."""
        rest = None if self.log_rest is None else self.log_rest[:rows]
        return self._replace(ids=self.ids[:rows], log_probs=self.log_probs[:rows], log_rest=rest)


class BlockInputs(NamedTuple):
    """The tensors of a `RowBlock`: the student's logits z, and what its tasks read.

    By task: `beside`, its teacher's logits or its labels; its class weights; `weights`, the factor of its slope; and
    `off`, the rows where that is 0. By group: its temperature and classes. `kept` are the top-k teachers.
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
    def of(cls, plan: Plan, block: RowBlock) -> "BlockInputs":
        """The inputs of the plan's tasks."""
        tasks = {k: block.task(k) for group in plan.groups for k in (*group.labels, *group.closed)}
        found: list[Any] = [tasks.get(k) for k in range(len(block.off))]
        beside = [None if t is None else t.labels if isinstance(t, LabelTask) else t.teacher for t in found]
        class_weights = [t.class_weights if isinstance(t, LabelTask) else None for t in found]
        temperatures = [_passed(group.temperature, block.z.device) for group in plan.groups]
        classes = [group.classes for group in plan.groups]
        kept = [Kept.of(block.task(k)) for k in plan.top_k]
        where = list(block.off), block.nowhere
        return cls(block.z, beside, class_weights, temperatures, classes, block.weights, *where, kept)

    def first(self, rows: int) -> "BlockInputs":
        """Those of the first `rows` rows."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:rows]

        beside, off = [cut(x) for x in self.beside], [cut(x) for x in self.off]
        weights = None if self.weights is None else self.weights[:, :rows]
        found = self._replace(z=self.z[:rows], beside=beside, weights=weights, off=off, nowhere=cut(self.nowhere))
        return found._replace(kept=[kept.first(rows) for kept in self.kept])

    def mark(self, out: Tensor | None) -> None:
        """Tell the compiler that the number of rows will change."""
        kept = [x for k in self.kept for x in (k.ids, k.log_probs, k.log_rest)]
        for tensor in (self.z, out, self.nowhere, *self.beside, *self.off, *kept):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self.weights is not None and self.weights.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(self.weights, 1)


def compute_block(
    groups: Sequence[Group],
    smoothing: Sequence[float | None],
    top_k: Mapping[int, tuple[Tail, ClosedForm]],
    dtype: torch.dtype,
    make: type[Side] | type[PiecedSide],
    inputs: BlockInputs,
    out: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Values `[k, r]` of all tasks; the gradient is written to `out`, or over the logits where that is None.

    Also returns what the caller has to write to the gradient: some classes of each row, and their numbers.
    """

    def side(logits: Tensor, temperature: Any) -> Side:
        if isinstance(temperature, float):  # a teacher's own
            return make(logits, temperature)
        if isinstance(temperature, Tensor):  # over a few classes, where term by term costs no time
            return make(logits, temperature, like=16.0)
        return make(logits, inputs.temperatures[temperature], like=_like(groups[temperature].temperature))

    z = inputs.z.to(dtype)
    tasks: list[Any] = [
        _Teacher(x) if smooth is None or x is None else LabelTask(x, smooth, w)
        for x, w, smooth in zip(inputs.beside, inputs.class_weights, smoothing, strict=True)
    ]
    for kept, (k, (tail, form)) in zip(inputs.kept, top_k.items(), strict=True):
        tasks[k] = _Teacher(kept.logits(tail), kept.classes, kept.temperature, (form, 1.0))
    here = [Group(n, inputs.classes[n], group.labels, group.closed, group.own) for n, group in enumerate(groups)]
    block = RowBlock(z, tasks.__getitem__, inputs.weights, inputs.off, inputs.nowhere, inputs.z)
    values, gradient = compute(Plan(here, list(top_k)), block, side)
    if gradient is None or block.gradient is None:
        return values.to(dtype), None
    place, left = inputs.z if out is None else out, block.gradient.left
    place.copy_(gradient)
    return values.to(dtype), None if left is None else (left[0], left[1].to(place.dtype))


class _Teacher(NamedTuple):
    teacher: Tensor | TopKLogits | None
    student_classes: Classes = None
    temperature: Tensor | float = 1.0
    closed_form: tuple[ClosedForm, float] | None = None


def structure(plan: Plan, tasks: Sequence[Task]) -> Hashable:
    """What is compiled in: the tasks' forms and tails, and which tasks each group has."""
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
    """A number for a temperature's code path: 1 and 2 have their own, those above 8 share one, and so do the others."""
    return temperature if temperature in (1, 2) else 16.0 if temperature > 8 else 4.0


def _passed(temperature: float, device: torch.device) -> float | Tensor:
    """A temperature as a tensor, so that it may change from step to step without a new compilation."""
    return temperature if temperature in (1, 2) else _tensor(temperature, device)


def _tensor(number: float, device: torch.device) -> Tensor:
    return torch.full((), number, dtype=widest(device), device=device)


def can_be_traced(plan: Plan, tasks: Sequence[Task]) -> bool:
    """Whether all tasks have closed forms, none with a tensor among its options, which would be compiled in."""
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
    top_k = isinstance(task.teacher, TopKLogits) and (task.teacher.tail, _which(task.student_classes))
    return form.func, options, top_k
