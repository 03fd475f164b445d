"""The terms that criteria share: what they read from outputs, and how they mix."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss.criteria._positions import Positions
from kdloss.engine import Divergence, Problem, Task, Vocabulary, fused, per_position, whole_only
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
    task = Task(divergence, settings.temperature, settings.alpha > 0, settings.vocabulary)
    if target is not None:
        task.check(student, target)
    if settings.check_finite:
        _look_at_numbers(where, student, target)
    if whole_only(student, divergence):
        teacher_there = None if target is None else where.take(target)
        plain = task.terms(where.take(student), teacher_there, where.labels, where.keep)
        terms = {name: value for name, value in zip(("ce", "kd"), plain, strict=True) if value is not None}
        return mixed(settings, terms, {"ce": weights[0], "kd": weights[1]}, where, num_items_in_batch)
    index, labels = where.counted(student.device)
    rows = where.numel if index is None else len(index)
    problem, local = Problem.of(task, student, target, labels, index, rows, settings.overwrite_logits)
    names = [name for name, there in (("ce", task.cross_entropy), ("kd", divergence is not None)) if there]
    size = denominator(max(rows, 1), settings.reduction, num_items_in_batch)
    if settings.reduction == "none":
        terms = dict(zip(("ce", "kd"), map(where.back, per_position(problem, local)), strict=True))
        loss = torch.stack([w * v for w, v in zip(weights, terms.values(), strict=True) if w > 0]).sum(0)
        return loss, {name: terms[name].detach() for name in names}
    share = torch.tensor(weights, dtype=widest(student.device), device=student.device) / size
    loss, *values = fused(problem, local, *share.unbind())
    sums = {name: value.sum() / size for name, value in zip(("ce", "kd"), values, strict=True)}
    return loss, {name: sums[name] for name in names}


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
