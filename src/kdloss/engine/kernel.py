"""Values of all tasks in a block of rows, and the gradient of their weighted sum by the student's logits."""

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
"""Values below this may be differences of nearly equal sums, and so have lost digits."""
MakeSide = Callable[[Tensor, Any], Side]


@dataclass
class RowBlock:
    """A block of rows: the student's logits z and the tasks' inputs; `compute` adds values and gradient.

    `task(k)` is task k for these rows. `weights`, `[k, r, 1]` or `[k, 1, 1]`, are the factors of the tasks' slopes,
    None where no gradient is wanted. `off` has the rows of each task where its weight is 0 (None: no row): such a row
    gets nothing from the task, even if its slope is infinite or NaN. `nowhere` has the rows where all weights are 0.
    `given`, used only in traced work, are the logits as they are in memory; z may be a copy of them.
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
        """Numbers times the weight of task k, exactly 0 where the weight is 0."""
        assert self.weights is not None
        by, off = self.weights[k], self.off[k]
        scaled = by if isinstance(numbers, float) and numbers == 1 else by * numbers
        return scaled if off is None else scaled.masked_fill(off, 0)


def compute(
    plan: Plan, block: RowBlock, side: MakeSide = Side, place: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Values `[k, r]` of all tasks of the plan in a block of rows; and the gradient, in `place` if that is given."""
    if block.weights is not None:
        block.gradient = Total(block.z, place)
    for k in plan.by_autograd:
        values, rows = by_autograd(block.task(k), block.z, block.gradient is not None)
        block.values[k] = values.unsqueeze(-1)
        if block.gradient is not None and rows is not None:
            block.gradient.add(rows, block.scaled(k), block.off[k])
    for k in plan.top_k:
        by_top_k(k, block, side)
    for group in plan.groups:
        q = side(chosen(block.z, group.classes), group.temperature)
        pull = by_closed_forms(group, q, block, side)
        by_labels(group, q, block, pull)
    values = torch.cat([block.values[k] for k in range(len(block.off))]).view(len(block.off), block.z.shape[0])
    return values, None if block.gradient is None else block.gradient.blanked(block.nowhere)


def by_closed_forms(group: Group, q: Side, block: RowBlock, side: MakeSide) -> Tensor | None:
    """Divergences with a closed form; returns the factor of the student's probabilities in the gradient."""
    pull = None
    for teacher, closed in group.closed.items():
        p = side(block.task(teacher).teacher.to(q.logits.dtype), group.own.get(teacher, group.temperature))
        for k, form in closed:
            value, slope, balance = form(q, p)
            block.values[k] = refined(value, form, q, p).clamp_min(0)  # a negative value is rounding
            if block.gradient is None:
                continue
            block.gradient.add(slope, block.scaled(k), block.off[k], group.classes)
            if balance is not None:
                own = block.scaled(k, -balance)
                pull = own if pull is None else pull + own
    return pull


def refined(value: Tensor, form: ClosedForm, q: Side, p: Side) -> Tensor:
    """The values of a form, with more digits in rows where student and teacher are nearly equal.

    There the values are small differences of sums. This is done on CPUs only: finding these rows would make an
    accelerator synchronise.
    """
    settled = q.flat or q.exact or q.pieced or q.shard is not None or not on_cpu(value.device)
    if settled or not bool((value < NEAR).any()):
        return value
    rows = (value < NEAR).flatten().nonzero().flatten()
    gap = (q.bits[rows] - p.bits[rows]).abs_().nan_to_num_(0.0).amax(-1)
    rows = rows[gap < 1]
    return value.index_copy(0, rows, form(q.carefully(rows), p.carefully(rows))[0]) if len(rows) else value


def by_top_k(k: int, block: RowBlock, side: MakeSide) -> None:
    """A divergence from a teacher's most probable classes."""
    task, wanted = block.task(k), block.gradient is not None
    classes = task.student_classes
    z = chosen(block.z, classes)
    dtype = z.dtype
    if block.given is None:
        if on_cpu(z.device) and dtype == torch.float32:  # so few numbers are cheap in float64, as in `at_once`
            dtype, side = torch.float64, ExactSide
        place = None if block.gradient is None or classes is not None else block.gradient.empty_place
        rest = partial(others_in_place, z, place)
    else:
        rest = partial(others_of_side, side, chosen(block.given, classes), z.dtype)
    of = among_few(partial(_compare, task, side, wanted), rest, z, task.teacher, dtype)
    block.values[k] = of.value
    if block.gradient is None or of.slope is None:
        return
    if of.others is not None:
        block.gradient.add(of.others, block.scaled(k, of.share), block.off[k], classes)
    block.gradient.at(of.classes, block.scaled(k, of.slope), classes)


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
    value = refined(value, form, q, p)
    if balance is not None:
        slope.addcmul_(q.probs, balance.to(slope.dtype), value=-1)
    return value.clamp_min(0), slope


def by_labels(group: Group, q: Side, block: RowBlock, pull: Tensor | None) -> None:
    """Cross-entropies; and the student's probabilities are added to the gradient, for them and for `pull`."""
    own, targets = None, []
    one = Unsoftened(*q.unsoftened()) if group.labels else None
    for k in group.labels:
        assert one is not None
        task: LabelTask = block.task(k)
        of = of_probabilities(task, q, one) if task.soft else of_classes(task, block.z, q, one)
        block.values[k] = of.value
        targets.append((k, of))
        if block.gradient is not None:
            factor = block.scaled(k) / one.total if of.sums is None else block.scaled(k, of.sums / one.total)
            own = factor if own is None else own + factor
    if block.gradient is None:
        return
    if one is not None and one.e is q.probs and own is not None and pull is not None:
        own, pull = own + pull, None
    if pull is not None:
        block.gradient.add(q.probs, pull, None, group.classes)
    if one is not None and own is not None:
        block.gradient.add(one.e, own)
    for k, of in targets:
        if of.everywhere is not None:
            block.gradient.add(of.everywhere, block.scaled(k, -1.0), block.off[k] if of.label is None else None)
        if of.label is not None:
            block.gradient.at(of.label, block.scaled(k, -1.0 if of.at_label is None else -of.at_label))


def by_autograd(task: TeacherTask, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Values and gradient of the plain function by autograd, for any divergence, kind of teacher and vocabulary."""
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
    """Raise where the loss depends on a trained tensor other than the logits: its gradient would be lost here."""
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
