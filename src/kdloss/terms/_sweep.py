"""The terms that read one student's logits, in one sweep over their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine import LabelTask, Problem, TeacherTask, fused, per_position
from kdloss.reduction import denominator, divided, widest
from kdloss.targets import TopKLogits
from kdloss.terms._outputs import look_at_numbers
from kdloss.terms._positions import Positions
from kdloss.terms.contract import Contract
from kdloss.terms.step import Step


@dataclass(frozen=True)
class Swept:
    """A term with a `task` for the engine, its weight, its step, and the student's logits that it reads."""

    term: Any
    weight: float | Tensor
    step: Step
    logits: Any


def by_logits(terms: Sequence[Swept]) -> list[list[Swept]]:
    """Those that read the same logits together."""
    groups: list[list[Swept]] = []
    for one in terms:
        group = next((g for g in groups if g[0].logits is one.logits), None)
        groups.append([one]) if group is None else group.append(one)
    return groups


def sweep(
    group: Sequence[Swept], widest_where: Positions, contract: Contract, items: int | Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of terms that read the same logits, and each one's mean."""
    logits, device = group[0].logits, group[0].logits.device
    index, _ = widest_where.counted(device)
    rows = widest_where.numel if index is None else len(index)
    counts = [_rows_that_count(one.step.where, widest_where) for one in group]
    tasks = [one.term.task(one.step, _labels(one.step.where, widest_where)) for one in group]
    for one, task in zip(group, tasks, strict=True):
        task.check(logits)
        look_at_stored(one, task, contract.check_finite)
        if contract.check_finite:
            check_numbers(one, task)
    problem, local = Problem.of(tuple(tasks), logits, index, rows, contract.overwrite_logits)
    sizes = [max(rows, 1) if keep is None else keep.sum().clamp_min(1) for keep in counts]
    if contract.reduction == "none":
        denominator(1, "none", items)
        loss: Any = None
        values = per_position(problem, local)
        for one, keep, row in zip(group, counts, values.unbind(), strict=True):
            there = widest_where.back(row if keep is None else row.where(keep, 0))
            loss = one.weight * there + (0 if loss is None else loss)
    else:
        each = rows if any(keep is not None for keep in counts) else 1
        shares = torch.stack(
            [
                _share(one.weight, denominator(size, contract.reduction, items), keep, device).expand(each)
                for one, size, keep in zip(group, sizes, counts, strict=True)
            ]
        )
        loss, values = fused(problem, local, shares)
    means = {
        one.term.name: (row if keep is None else row.where(keep, 0)).detach().sum() / size
        for one, row, keep, size in zip(group, values.unbind(), counts, sizes, strict=True)
    }
    return loss, means


def _rows_that_count(where: Positions, widest_where: Positions) -> Tensor | None:
    """Which of the rows count for one term; None for all."""
    if where.keep is None or where.keep is widest_where.keep:
        return None
    return where.keep.reshape(-1) if widest_where.keep is None else where.keep[widest_where.keep]


def _labels(where: Positions, widest_where: Positions) -> Tensor | None:
    """Class indices of all rows, 0 where a term doesn't count."""
    if where.labels is None:
        return None
    return where.labels.reshape(-1) if widest_where.keep is None else where.labels[widest_where.keep]


def _share(weight: float | Tensor, size: int | Tensor, keep: Tensor | None, device: torch.device) -> Tensor:
    """What each row of a term is multiplied by."""
    wide: dict[str, Any] = {"dtype": widest(device), "device": device}
    share = divided(weight.to(**wide) if isinstance(weight, Tensor) else torch.full((), weight, **wide), size)
    return share.expand(1) if keep is None else share * keep


def look_at_stored(one: Swept, task: LabelTask | TeacherTask, always: bool) -> None:
    """Raise for what can't be in a stored teacher's rows that count; on an accelerator only if that is wanted."""
    if isinstance(task, TeacherTask) and isinstance(task.teacher, TopKLogits):
        where, teacher = one.step.where, task.teacher
        classes = one.logits.shape[-1] if task.vocabulary is None else teacher.vocabulary
        there = teacher.at(lambda t: t[:, :-1]) if where.causal else teacher
        there.look(classes, where.keep, always=always)


def check_numbers(one: Swept, task: LabelTask | TeacherTask) -> None:
    """Raise for NaN or +inf at a position that counts, and labels that name no class."""
    where, logits = one.step.where, one.logits
    look_at_numbers("student", logits, where)
    if isinstance(task, TeacherTask):
        look_at_numbers("teacher", task.teacher, where)
    if where.labels is not None:
        keep = where.labels >= 0 if where.keep is None else where.keep
        _checks.label_range(where.labels, keep, logits.shape[-1], shift=where.causal)
