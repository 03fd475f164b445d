"""All terms on the student's logits, computed in one sweep over the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine import LabelTask, Problem, TeacherTask, fused, per_position
from kdloss.engine.fused import times
from kdloss.engine.run import column_of
from kdloss.reduction import denominator, divided, widest
from kdloss.targets import TopKLogits
from kdloss.targets.looks import free_to_look, look_again
from kdloss.terms._outputs import look_at_numbers
from kdloss.terms._positions import Positions
from kdloss.terms.contract import Contract
from kdloss.terms.step import Step

Count = int | Tensor


@dataclass
class Swept:
    """A term with a `task` for the engine, its weight, its step, and the student's logits that it reads.

    `share` has one more factor for each position, from the term's weighting.
    """

    term: Any
    weight: float | Tensor
    step: Step
    logits: Any
    share: Tensor | None = None


def by_logits(terms: Sequence[Swept]) -> list[list[Swept]]:
    """Group the terms that read the same logits."""
    groups: list[list[Swept]] = []
    for one in terms:
        group = next((g for g in groups if g[0].logits is one.logits), None)
        groups.append([one]) if group is None else group.append(one)
    return groups


def sweep(
    group: Sequence[Swept],
    widest_where: Positions,
    contract: Contract,
    items: int | Tensor | None,
    *,
    known: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of terms that read the same logits, and each term's mean.

    `known`: the inputs are known to fit each other, so the checks are skipped.
    """
    logits, device = group[0].logits, group[0].logits.device
    places, index = widest_where.counted(device)
    rows = widest_where.numel if places is None else len(places)
    labels = _at(widest_where.labels, places)
    tasks = []
    for one in group:
        where = one.step.where
        task = one.term.task(one.step, labels if where is widest_where else _at(where.labels, places))
        tasks.append(task)
        if not known:
            task.check(logits)
            look_at_given(one, task, contract.check_finite)
            if contract.check_finite:
                check_numbers(one, task)
    counts = [_rows_that_count(one.step.where, widest_where, places) for one in group]
    numbers = not any(isinstance(one.weight, Tensor) or one.share is not None for one in group)
    nonzero = numbers and all(keep is None for keep in counts)
    problem, local = Problem.of(tasks, logits, index, rows, contract.overwrite_logits, nonzero)
    if contract.reduction == "none":
        denominator(1, "none", items)
        values = per_position(problem, local)
        loss: Any = 0
        for one, keep, row in zip(group, counts, values.unbind(), strict=True):
            row = row if one.share is None else times(row, _there(one.share, places))
            row = times(row, one.weight)
            loss = widest_where.back(row if keep is None else row.where(keep, 0), places) + loss
        return loss, _means(group, values.detach(), counts, rows)
    loss, values = fused(problem, local, _shares(group, counts, places, rows, contract, items, device))
    return loss, _means(group, values, counts, rows)


def _rows_that_count(where: Positions, widest_where: Positions, places: Tensor | None) -> Tensor | None:
    """Which of the rows count for one term; None if all do."""
    all_do = where.keep is widest_where.keep and widest_where.exact
    return None if all_do else _at(where.keep, places)


def _at(x: Tensor | None, places: Tensor | None) -> Tensor | None:
    """The entries of `x` at these places of all positions (None: everywhere), flattened."""
    return x if x is None or (places is None and x.ndim == 1) else _there(x, places)


def _there(x: Tensor, places: Tensor | None) -> Tensor:
    return x.reshape(-1) if places is None else x.take(places)


def _shares(
    group: Sequence[Swept],
    counts: Sequence[Tensor | None],
    places: Tensor | None,
    rows: int,
    contract: Contract,
    items: int | Tensor | None,
    device: torch.device,
) -> Tensor:
    """The factor of each row for each term, `[terms, rows]`, or `[terms, 1]` where it is the same for all rows."""
    dtype = widest(device)
    per_row = any(keep is not None for keep in counts) or any(one.share is not None for one in group)
    sizes = [denominator(_size(keep, rows), contract.reduction, items) for keep in counts]
    if not per_row and not any(isinstance(x, Tensor) for x in (sizes[0], *(one.weight for one in group))):
        return column_of(tuple(one.weight / sizes[0] for one in group), dtype, device)
    wide: dict[str, Any] = {"dtype": dtype, "device": device}
    each = rows if per_row else 1
    shares = []
    for one, size, keep in zip(group, sizes, counts, strict=True):
        weight = one.weight.to(**wide) if isinstance(one.weight, Tensor) else torch.full((), one.weight, **wide)
        share = divided(weight, size)
        share = share if one.share is None else share * _there(one.share, places)
        shares.append((share if keep is None else share * keep).expand(each))
    return torch.stack(shares)


def _means(group: Sequence[Swept], values: Tensor, counts: Sequence[Tensor | None], rows: int) -> dict[str, Tensor]:
    """Each term's mean over the rows that count for it."""
    found: Any
    if all(keep is None for keep in counts):
        found = (values.mean(1) if rows else values.sum(1)).unbind()
    else:
        found = (
            (row if keep is None else row.where(keep, 0)).sum() / _size(keep, rows)
            for row, keep in zip(values.unbind(), counts, strict=True)
        )
    return {one.term.name: mean for one, mean in zip(group, found, strict=True)}


def _size(keep: Tensor | None, rows: int) -> Count:
    """How many rows count, at least 1."""
    return max(rows, 1) if keep is None else keep.sum().clamp_min(1)


def look_at_given(one: Swept, task: LabelTask | TeacherTask, always: bool) -> None:
    """Raise for impossible numbers of a stored teacher or of soft labels, in rows that count.

    On an accelerator only if `always`.
    """
    where = one.step.where
    if isinstance(task, LabelTask) and task.soft and (always or free_to_look(task.labels, where.keep)):
        labels = task.labels[:, :-1] if where.causal else task.labels  # they stand at the logits already
        _checks.probabilities(labels, where.keep, where.causal)
    if isinstance(task, TeacherTask) and isinstance(task.teacher, TopKLogits):
        teacher = task.teacher
        classes = one.logits.shape[-1] if task.vocabulary is None else teacher.vocabulary
        there = teacher.at(lambda t: t[:, :-1]) if where.causal else teacher
        look_again(there, classes, where.keep, always=always)


def check_numbers(one: Swept, task: LabelTask | TeacherTask) -> None:
    """Raise for NaN or +inf at a position that counts, and for labels out of range."""
    where, logits = one.step.where, one.logits
    look_at_numbers("student", logits, where)
    if isinstance(task, TeacherTask):
        look_at_numbers("teacher", task.teacher, where)
    if where.labels is not None:
        keep = torch.ones_like(where.labels, dtype=torch.bool) if where.keep is None else where.keep
        _checks.label_range(where.labels, keep, logits.shape[-1], shift=where.causal)
