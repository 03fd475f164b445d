"""Values of all tasks in a few rows, and the gradient of their weighted sum by the student's logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.labels import Unsoftened, of_classes, of_probabilities
from kdloss.engine.plan import Group, Plan
from kdloss.engine.side import ExactSide, Side
from kdloss.engine.task import LabelTask, TeacherTask
from kdloss.engine.top_k import among_few, others_in_place, others_of_side
from kdloss.engine.total import Total
from kdloss.reduction import on_cpu, precise
from kdloss.targets.kinds import chosen

NEAR = 2.0**-7
"""Values below may be differences of sums that are nearly the same."""
MakeSide = Callable[[Tensor, Any], Side]


@dataclass
class Few:
    """A few rows: the student's logits and what its tasks read beside them; then values and gradient.

    `task` gives a task with what it has in these rows, by its number. `weights` `[k, r, 1]`, or `[k, 1, 1]`, are what
    the tasks' slopes are multiplied with, None where no gradient is wanted, and `off` is where they are 0, for tasks
    where some are: such a row gets nothing from the task, even if that is infinite or no number. `nowhere` is where all
    are 0. `given`, for what a compiler traces alone, are the logits as they are in memory, of which z may be a copy.
    """

    z: Tensor
    task: Callable[[int], Any]
    weights: Tensor | None
    off: Sequence[Tensor | None]
    nowhere: Tensor | None = None
    given: Tensor | None = None
    values: dict[int, Tensor] = field(default_factory=dict)
    gradient: Total | None = None

    def scaled(self, k: int, numbers: Tensor | float = 1.0) -> Tensor:
        """Numbers by a task's weight, 0 where that is 0."""
        assert self.weights is not None
        by, off = self.weights[k], self.off[k]
        scaled = by if isinstance(numbers, float) and numbers == 1 else by * numbers
        return scaled if off is None else scaled.masked_fill(off, 0)


def compute(plan: Plan, few: Few, side: MakeSide = Side, place: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Values `[k, r]` of all tasks of the plan in a few rows; and the gradient, in its place where one is given."""
    if few.weights is not None:
        few.gradient = Total(few.z, place)
    for k in plan.by_autograd:
        values, rows = by_autograd(few.task(k), few.z, few.gradient is not None)
        few.values[k] = values.unsqueeze(-1)
        if few.gradient is not None and rows is not None:
            few.gradient.add(rows, few.scaled(k), few.off[k])
    for k in plan.top_k:
        by_top_k(k, few, side)
    for group in plan.groups:
        q = side(chosen(few.z, group.classes), group.temperature)
        pull = by_closed_forms(group, q, few, side)
        by_labels(group, q, few, pull)
    values = torch.cat([few.values[k] for k in range(len(few.off))]).view(len(few.off), few.z.shape[0])
    return values, None if few.gradient is None else few.gradient.blanked(few.nowhere)


def by_closed_forms(group: Group, q: Side, few: Few, side: MakeSide) -> Tensor | None:
    """Divergences of a closed form; and what the student's probabilities are to be multiplied with in the gradient."""
    pull = None
    for teacher, closed in group.closed.items():
        p = side(few.task(teacher).teacher.to(q.logits.dtype), group.own.get(teacher, group.temperature))
        for k, form in closed:
            value, slope, balance = form(q, p)
            few.values[k] = closer(value, form, q, p).clamp_min(0)  # below it is rounding
            if few.gradient is None:
                continue
            few.gradient.add(slope, few.scaled(k), few.off[k], group.classes)
            if balance is not None:
                own = few.scaled(k, -balance)
                pull = own if pull is None else pull + own
    return pull


def closer(value: Tensor, form: ClosedForm, q: Side, p: Side) -> Tensor:
    """The values of a form, with more digits in rows where student and teacher are nearly the same.

    There they are small differences of sums. Which rows these are is only looked at where that waits for nothing.
    """
    settled = q.flat or q.exact or q.pieced or q.shard is not None or not on_cpu(value.device)
    if settled or not bool((value < NEAR).any()):
        return value
    rows = (value < NEAR).flatten().nonzero().flatten()
    gap = (q.bits[rows] - p.bits[rows]).abs_().nan_to_num_(0.0).amax(-1)
    rows = rows[gap < 1]
    return value.index_copy(0, rows, form(q.carefully(rows), p.carefully(rows))[0]) if len(rows) else value


def by_top_k(k: int, few: Few, side: MakeSide) -> None:
    """A divergence from a teacher's most probable classes."""
    task, wanted = few.task(k), few.gradient is not None
    classes = task.student_classes
    z = chosen(few.z, classes)
    dtype = z.dtype
    if few.given is None:
        if on_cpu(z.device) and dtype == torch.float32:  # a few numbers, as in `at_once`
            dtype, side = torch.float64, ExactSide
        place = None if few.gradient is None or classes is not None else few.gradient.empty_place
        rest = partial(others_in_place, z, place)
    else:
        rest = partial(others_of_side, side, chosen(few.given, classes), z.dtype)
    of = among_few(partial(_compare, task, side, wanted), rest, z, task.teacher, dtype)
    few.values[k] = of.value
    if few.gradient is None or of.slope is None:
        return
    if of.others is not None:
        few.gradient.add(of.others, few.scaled(k, of.share), few.off[k], classes)
    few.gradient.at(of.classes, few.scaled(k, of.slope), classes)


def _compare(
    task: TeacherTask, side: MakeSide, wanted: bool, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The values of a divergence and, if wanted, their slopes by the student's logits."""
    if task.closed_form is None:
        values, gradient = by_autograd(
            replace(task, teacher=teacher, labels=None, student_classes=None), student, wanted
        )
        return values.unsqueeze(-1), gradient
    form, _ = task.closed_form
    q, p = side(student, task.temperature), side(teacher, task.temperature)
    value, slope, balance = form(q, p)
    value = closer(value, form, q, p)
    if balance is not None:
        slope.addcmul_(q.probs, balance.to(slope.dtype), value=-1)
    return value.clamp_min(0), slope


def by_labels(group: Group, q: Side, few: Few, pull: Tensor | None) -> None:
    """Cross-entropies, and the student's own part in the gradient of all that was computed with it."""
    own, targets = None, []
    one = Unsoftened(*q.unsoftened()) if group.labels else None
    for k in group.labels:
        assert one is not None
        task: LabelTask = few.task(k)
        of = of_probabilities(task, q, one) if task.soft else of_classes(task, few.z, q, one)
        few.values[k] = of.value
        targets.append((k, of))
        if few.gradient is not None:
            part = few.scaled(k) / one.total if of.sums is None else few.scaled(k, of.sums / one.total)
            own = part if own is None else own + part
    if few.gradient is None:
        return
    if one is not None and one.e is q.probs and own is not None and pull is not None:
        own, pull = own + pull, None
    if pull is not None:
        few.gradient.add(q.probs, pull, None, group.classes)
    if one is not None and own is not None:
        few.gradient.add(one.e, own)
    for k, of in targets:
        if of.everywhere is not None:
            few.gradient.add(of.everywhere, few.scaled(k, -1.0), few.off[k] if of.label is None else None)
        if of.label is not None:
            few.gradient.at(of.label, few.scaled(k, -1.0 if of.at_label is None else -of.at_label))


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
