"""The terms that criteria share: what they read from outputs, and how they mix."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss.criteria._positions import Positions
from kdloss.engine import (
    Divergence,
    LabelTask,
    Problem,
    Task,
    TeacherTask,
    Vocabulary,
    fused,
    per_position,
    specification,
    whole_only,
)
from kdloss.reduction import Reduction, denominator, reduce, widest
from kdloss.targets import LazyLogits, Logits, ShardedLogits, at, localised


@runtime_checkable
class Settings(Protocol):
    """What every criterion remembers."""

    alpha: float
    temperature: float
    divergence: Divergence
    reduction: Reduction
    check_finite: bool
    vocabulary: Vocabulary | None
    overwrite_logits: bool
    components: dict[str, Tensor]

    @property
    def uses_teacher_logits(self) -> bool: ...


def logits_of(output: Any, whose: str) -> Any:
    """Logits from a tensor, any other kind of logits, a Hugging Face output or a captured one."""
    if isinstance(output, Captured):
        output = output.output
    logits = find_logits(output)
    if logits is None:
        raise TypeError(
            f"the {whose}'s logits are needed: pass a tensor, or an output or dict that has logits, "
            f"got {type(output).__name__}"
        )
    return logits


def find_logits(output: Any) -> Logits | None:
    """The logits, where there are any."""
    output = localised(output)
    if isinstance(output, Logits):
        return output
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    output = localised(output)
    return output if isinstance(output, Logits) else None


def logit_loss(
    settings: Settings,
    student: Tensor | LazyLogits | ShardedLogits,
    teacher: Any,
    where: Positions,
    weights: tuple[float, float],
    num_items_in_batch: int | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy ("ce") and divergence ("kd") by weight, and each reduced alone, detached."""
    if settings.alpha > 0 and where.labels is None:
        raise ValueError(
            f"alpha={settings.alpha} mixes in cross-entropy, which needs labels: pass labels=..., or write alpha=0"
        )
    target = None
    if settings.uses_teacher_logits:
        target = logits_of(teacher, "teacher").detach()
    divergence = settings.divergence if settings.uses_teacher_logits else None
    whole = whole_only(student, divergence)
    index, labels = (None, where.labels) if whole else where.counted(student.device)
    rows = where.numel if index is None else len(index)
    tasks: dict[str, Task] = {}
    if settings.alpha > 0 and labels is not None:
        tasks["ce"] = LabelTask(labels)
    if divergence is not None and target is not None:
        kd = TeacherTask(divergence, target, settings.temperature, settings.vocabulary, labels)
        kd.check(student)
        tasks["kd"] = kd
    by_name = dict(zip(("ce", "kd"), weights, strict=True))
    if settings.check_finite:
        _look_at_numbers(where, student, target)
    if whole:
        there = [task.at(where.take) for task in tasks.values()]
        terms = dict(zip(tasks, specification(there, where.take(student), where.keep), strict=True))
        return mixed(settings, terms, by_name, where, num_items_in_batch)
    problem, local = Problem.of(list(tasks.values()), student, index, rows, settings.overwrite_logits)
    size = denominator(max(rows, 1), settings.reduction, num_items_in_batch)
    if settings.reduction == "none":
        terms = dict(zip(tasks, map(where.back, per_position(problem, local)), strict=True))
        loss = torch.stack([by_name[name] * value for name, value in terms.items()]).sum(0)
        return loss, {name: value.detach() for name, value in terms.items()}
    share = torch.tensor([by_name[name] for name in tasks], dtype=widest(student.device), device=student.device) / size
    loss, values = fused(problem, local, share.unsqueeze(-1))
    return loss, {name: value.sum() / size for name, value in zip(tasks, values, strict=True)}


def mixed(
    settings: Settings,
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    where: Positions,
    num_items_in_batch: int | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reduce each term over the positions, and add up by weight; with the terms, detached."""
    terms = {
        name: reduce(
            value,
            where.keep,
            reduction=settings.reduction,
            num_items_in_batch=num_items_in_batch,
        )
        for name, value in values.items()
    }
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum(0)
    return loss, {name: term.detach() for name, term in terms.items()}


def _look_at_numbers(where: Positions, student: Logits, teacher: Logits | None) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        at(logits, partial(_look_at, name, where)) if logits is not None else None
    if where.labels is not None:
        keep = where.labels >= 0 if where.keep is None else where.keep
        _checks.label_range(where.labels, keep, student.shape[-1], shift=where.causal)


def _look_at(name: str, where: Positions, x: Tensor) -> Tensor:
    there = x[:, :-1] if where.causal else x
    keep = where.keep
    if keep is None:
        keep = torch.ones(there.shape[: len(where.shape)], dtype=torch.bool, device=x.device)
    _checks.finite(name, there, keep)
    return x
