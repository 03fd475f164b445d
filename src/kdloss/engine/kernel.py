"""Values of all tasks in a few rows, and the gradient of their weighted sum by the student's logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.labels import Unsoftened, of_classes, of_probabilities
from kdloss.engine.plan import Group, Plan
from kdloss.engine.rows import Teachers
from kdloss.engine.side import New, Side
from kdloss.engine.task import Task, TeacherTask
from kdloss.engine.top_k import by_top_k
from kdloss.engine.total import Scratch, Total
from kdloss.reduction import precise
from kdloss.targets import Shard


@dataclass(frozen=True)
class Few:
    """A few rows: the student's and teachers', and where values and gradient go.

    `weights` are `[r, 1]` for each task, and `off` is where they are 0, for tasks where some are: such a row gets
    nothing from the task, even if that is infinite or no number.
    """

    start: int
    stop: int
    z: Tensor
    teachers: Teachers
    values: Tensor
    weights: Sequence[Tensor] | None
    off: Sequence[Tensor | None]
    gradient: Total | None

    def task(self, task: Task) -> Any:
        """The task with its teacher and labels in these rows."""
        start, stop = self.start, self.stop
        if isinstance(task, TeacherTask):
            labels = None if task.labels is None else task.labels[start:stop]
            return replace(task, teacher=self.teachers(task.teacher, start, stop, task.temperature), labels=labels)
        return replace(
            task, labels=self.teachers(task.labels, start, stop, 1.0) if task.soft else task.labels[start:stop]
        )

    def note(self, k: int, value: Tensor, rows: Tensor | None, size: float = 1.0) -> None:
        """A task's values, and what it adds to the gradient by weight; overwrites the rows."""
        self.values[k, self.start : self.stop] = value.squeeze(-1)
        if rows is not None and self.gradient is not None and self.weights is not None:
            self.gradient.add(rows, self.weights[k] * size, self.off[k])

    def scaled(self, k: int, numbers: Tensor | None) -> Tensor | float:
        """Numbers `[r, 1]` by a task's weight, 0 where that is 0."""
        if numbers is None or self.weights is None:
            return 0.0
        scaled, off = self.weights[k] * numbers, self.off[k]
        return scaled if off is None else scaled.masked_fill(off, 0)


def compute(plan: Plan, few: Few, scratch: Scratch, shard: Shard | None) -> None:
    """All tasks of the plan in a few rows."""
    for k in plan.by_autograd:
        values, rows = by_autograd(few.task(plan.tasks[k]), few.z, few.gradient is not None)
        few.note(k, values.unsqueeze(-1), rows)
    for temperature, group in plan.groups.items():
        with scratch.borrowed():
            new = scratch.of(len(few.z))
            q = Side(few.z, temperature, new, shard)
            pull = by_teachers(plan, group, q, few, scratch, new)
            by_labels(plan, group, q, few, pull, new)


def by_teachers(plan: Plan, group: Group, q: Side, few: Few, scratch: Scratch, new: New) -> Tensor | float:
    """Divergences in closed form and from top-k teachers; returns what the student's probabilities are to be
    multiplied with in the gradient.
    """
    pull: Tensor | float = 0.0
    for numbers in group.closed.values():
        with scratch.borrowed():
            p = Side(few.task(plan.tasks[numbers[0]]).teacher, q.temperature, new, q.shard)
            for k in numbers:
                task = plan.tasks[k]
                assert isinstance(task, TeacherTask) and task.closed_form is not None
                form, squared = task.closed_form
                with scratch.borrowed():
                    value, slope, balance = form(q, p, new)
                    few.note(k, value * squared, slope, squared / q.temperature)
                pull = pull - few.scaled(k, None if balance is None else balance * (squared / q.temperature))
    for k in group.top_k:
        task = few.task(plan.tasks[k])
        with scratch.borrowed():
            values, rows = by_top_k(task, few.z, q, task.teacher, few.gradient is not None, new)
            few.note(k, values.unsqueeze(-1), rows)
    return pull


def by_labels(plan: Plan, group: Group, q: Side, few: Few, pull: Tensor | float, new: New) -> None:
    """Cross-entropies, and the student's own part in the gradient of all that was computed with it."""
    targets = {}
    one = Unsoftened.of(q, new) if group.labels else None
    for k in group.labels:
        task = few.task(plan.tasks[k])
        assert one is not None
        of = of_probabilities(task, q, one, new) if task.soft else of_classes(task, few.z, q, one, new)
        few.note(k, of.value, None)
        targets[k] = of
    if few.gradient is None or few.weights is None:
        return
    own: Tensor | float = 0.0
    for k, of in targets.items():
        assert one is not None
        own = own + few.scaled(k, of.sums / one.total)
    if one is not None and one.e is q.probs:
        pull, own = pull + own, 0.0
    for rows, by in ((q.probs, pull), (None if one is None else one.e, own)):
        if rows is not None and isinstance(by, Tensor):
            few.gradient.add(rows, by)
    for k, of in targets.items():
        of.subtract_from(few.gradient, few.weights[k], few.off[k])


def by_autograd(task: TeacherTask, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Values and gradient of the specification, for any divergence, kind of teacher and vocabulary."""
    with torch.set_grad_enabled(wanted):
        z = precise(z.detach()).requires_grad_(wanted)
        values = task.values(z)
        if not wanted:
            return values, None
        loss = values.sum()
        _nothing_else_is_trained(loss, z)
        (gradient,) = torch.autograd.grad(loss, z)
    return values.detach(), gradient


def _nothing_else_is_trained(loss: Tensor, z: Tensor) -> None:
    """Gradients of anything but the student would be lost here in silence."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", z)
        if leaf is not z:
            raise ValueError(
                f"the divergence has something of its own to train, of shape {tuple(leaf.shape)}; write it "
                "as an nn.Module with parameters, which is computed in a way that trains them"
            )
        nodes += [below for below, _ in node.next_functions]
