"""The terms that criteria share: what they read from outputs, and how they mix."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.capture import Captured
from kdloss.criteria._positions import Positions
from kdloss.cross_entropy import cross_entropy
from kdloss.reduction import Reduction, reduce


@runtime_checkable
class Divergence(Protocol):
    """Anything of the shape of `kdloss.forward_kl`."""

    def __call__(self, student: Tensor, teacher: Tensor, /, *, temperature: float) -> Tensor: ...


@runtime_checkable
class Settings(Protocol):
    """What every criterion remembers."""

    alpha: float
    temperature: float
    divergence: Divergence
    reduction: Reduction
    check_finite: bool
    components: dict[str, Tensor]

    @property
    def uses_teacher_logits(self) -> bool: ...


def logits_of(output: Any, whose: str) -> Tensor:
    """Logits from a plain tensor, a Hugging Face output or a captured one."""
    if isinstance(output, Captured):
        output = output.output
    logits = find_logits(output)
    if logits is None:
        raise TypeError(
            f"the {whose}'s logits are needed: pass a tensor, or an output or dict that has logits, "
            f"got {type(output).__name__}"
        )
    return logits


def find_logits(output: Any) -> Tensor | None:
    """The logits, where there are any."""
    if isinstance(output, Tensor):
        return output
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


def logit_values(settings: Settings, student: Tensor, teacher: Any, where: Positions) -> dict[str, Tensor]:
    """Cross-entropy ("ce") and divergence ("kd") at every position, those that have weight."""
    values: dict[str, Tensor] = {}
    logits = where.take(student)
    if settings.check_finite:
        _look_at_numbers(where, student=student)
    if settings.alpha > 0:
        if where.labels is None:
            raise ValueError(
                f"alpha={settings.alpha} mixes in cross-entropy, which needs labels: "
                "pass labels=..., or write alpha=0"
            )
        values["ce"] = cross_entropy(logits, where.labels)
    if settings.uses_teacher_logits:
        target = logits_of(teacher, "teacher").detach()
        _checks.logits(student, target)
        if settings.check_finite:
            _look_at_numbers(where, teacher=target)
        target = where.take(target)
        values["kd"] = settings.divergence(logits, target, temperature=settings.temperature)
    return values


def mixed(
    settings: Settings,
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    where: Positions,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """Reduce each term over the positions, remember it detached, and add up by weight."""
    terms = {
        name: reduce(
            value,
            where.keep,
            reduction=settings.reduction,
            num_items_in_batch=num_items_in_batch,
        )
        for name, value in values.items()
    }
    settings.components = {name: term.detach() for name, term in terms.items()}
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum(0)


def _look_at_numbers(where: Positions, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        x = tensor[:, :-1] if where.causal else tensor
        keep = x.new_ones(x.shape[:-1], dtype=torch.bool) if where.keep is None else where.keep
        _checks.finite(name, x, keep)
        if where.labels is not None:
            _checks.label_range(where.labels, keep, x.shape[-1], shift=where.causal)
