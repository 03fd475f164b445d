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
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.engine.top_k import among_few
from kdloss.engine.total import Scratch, Total
from kdloss.reduction import precise
from kdloss.targets.sharded import Shard


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

    def teacher(self, task: TeacherTask) -> Any:
        """A teacher's rows."""
        return self.teachers(task.teacher, self.start, self.stop, task.temperature)

    def labels(self, task: Task) -> Any:
        """Labels in these rows."""
        if task.labels is None:
            return None
        if isinstance(task, LabelTask) and task.soft:
            return self.teachers(task.labels, self.start, self.stop, 1.0)
        return task.labels[self.start : self.stop]

    def note(self, k: int, value: Tensor) -> None:
        """A task's values `[r, 1]`."""
        self.values[k, self.start : self.stop] = value.squeeze(-1)

    def scaled(self, k: int, numbers: Tensor | float) -> Tensor:
        """Numbers by a task's weight, 0 where that is 0."""
        assert self.weights is not None
        scaled, off = self.weights[k] * numbers, self.off[k]
        return scaled if off is None else scaled.masked_fill(off, 0)


def compute(plan: Plan, few: Few, scratch: Scratch, shard: Shard | None) -> None:
    """All tasks of the plan in a few rows."""
    for k, task in plan.by_autograd:
        here = replace(task, teacher=few.teacher(task), labels=few.labels(task))
        values, rows = by_autograd(here, few.z, few.gradient is not None)
        few.note(k, values.unsqueeze(-1))
        if few.gradient is not None and rows is not None:
            few.gradient.add(rows, few.scaled(k, 1.0), few.off[k])
    new = scratch.of(len(few.z))
    for temperature, group in plan.groups.items():
        with scratch.borrowed():
            if group.closed or group.labels:
                q = Side(few.z, temperature, new, shard, normalise=bool(group.closed))
                pull = by_closed_forms(group, q, few, scratch, new)
                by_labels(group, q, few, pull, new)
        by_top_k(group, few, scratch, new)


def by_closed_forms(group: Group, q: Side, few: Few, scratch: Scratch, new: New) -> Tensor | None:
    """Divergences of a closed form; and what the student's probabilities are to be multiplied with in the gradient."""
    pull = None
    for of_teacher in group.closed.values():
        with scratch.borrowed():
            p = Side(few.teacher(of_teacher[0].task), q.temperature, new, q.shard)
            for k, _, form, size in of_teacher:
                with scratch.borrowed():
                    value, slope, balance = form(q, p, new)
                    few.note(k, value * size)
                    if few.gradient is None:
                        continue
                    few.gradient.add(slope, few.scaled(k, size / q.temperature), few.off[k])
                if balance is not None:
                    own = few.scaled(k, balance * (-size / q.temperature))
                    pull = own if pull is None else pull + own
    return pull


def by_top_k(group: Group, few: Few, scratch: Scratch, new: New) -> None:
    """Divergences from a teacher's most probable classes."""
    for k, task in group.top_k:
        with scratch.borrowed():
            of = among_few(task, few.z, few.teacher(task), few.gradient is not None, new)
            few.note(k, of.value)
            if few.gradient is not None:
                few.gradient.add(of.others, few.scaled(k, of.share), few.off[k])
                few.gradient.at(of.classes, few.scaled(k, of.slope))


def by_labels(group: Group, q: Side, few: Few, pull: Tensor | None, new: New) -> None:
    """Cross-entropies, and the student's own part in the gradient of all that was computed with it."""
    own, targets = None, []
    one = Unsoftened.of(q, new) if group.labels else None
    for k, task in group.labels:
        assert one is not None
        labels = few.labels(task)
        of = of_probabilities(task, labels, q, one, new) if task.soft else of_classes(task, labels, few.z, q, one, new)
        few.note(k, of.value)
        targets.append((k, of))
        if few.gradient is not None:
            part = few.scaled(k, of.sums / one.total)
            own = part if own is None else own + part
    if few.gradient is None:
        return
    if one is not None and one.e is q.probs and own is not None and pull is not None:
        own, pull = own + pull, None
    if pull is not None:
        few.gradient.add(q.probs, pull)
    if one is not None and own is not None:
        few.gradient.add(one.e, own)
    for k, of in targets:
        if of.everywhere is not None:
            few.gradient.add(of.everywhere, few.scaled(k, -1.0), few.off[k] if of.label is None else None)
        if of.label is not None and of.at_label is not None:
            few.gradient.at(of.label, few.scaled(k, -of.at_label))


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
