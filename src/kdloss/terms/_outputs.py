"""Finding logits in what a model returned."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor

from kdloss import _checks
from kdloss._capture import Captured, Take
from kdloss._capture.take import described, follow
from kdloss._layout import NOTHING, Evidence
from kdloss.targets.kinds import KINDS, AnyLogits, at
from kdloss.targets.sharded import localised
from kdloss.terms._no_logits import no_logits
from kdloss.terms._positions import Positions


def returned(output: Any) -> Any:
    """The model's own output, without what was captured beside it."""
    return output.output if isinstance(output, Captured) else output


def part_of(output: Any, take: Take) -> Any:
    """The part of an output at an index, a key or a path, or that a function finds; None if there is none."""
    return take(output) if callable(take) else follow(output, () if take is None else take)


def logits_of(output: Any, whose: str, take: Take = None) -> Any:
    """The logits in an output: a tensor, another kind of logits, a Hugging Face or captured output, or by `take`."""
    output = returned(output)
    if take is not None:
        found = localised(part_of(output, take))
        if isinstance(found, KINDS):
            return found
        raise TypeError(
            f"take={take!r} finds no logits in the {whose}'s output, {described(output)}{otherwise(output, take)}"
        )
    logits = find_logits(output)
    if logits is None:
        raise no_logits(output, whose)
    return logits


def head_of(output: Any, take: Take) -> Evidence:
    """What a model's last layer tells about the axes of its logits; nothing about those that a function takes."""
    return output.head if isinstance(output, Captured) and not callable(take) else NOTHING


def otherwise(output: Any, take: Take) -> str:
    """For an error: what to write where `take` names a part of an output that is a tensor, which has no parts."""
    if not isinstance(output, Tensor):
        return ""
    part = f"output[{take!r}]" if isinstance(take, (int, str)) else "output[0]"
    return (
        ". Where a model returns its logits alone in one mode (teachers run in eval mode) and with other parts in the "
        f"other, take is a function: take=lambda output: output if isinstance(output, torch.Tensor) else {part}"
    )


def find_logits(output: Any) -> AnyLogits | None:
    """The logits in an output, or None."""
    if type(output) is Tensor:
        return output
    output = localised(output)
    if isinstance(output, KINDS):
        return output
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    output = localised(output)
    return output if isinstance(output, KINDS) else None


def class_indices(labels: Any) -> Tensor | None:
    """The labels if they are integers, and so may be class indices; else None."""
    return labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def stand_at(labels: Tensor | None, logits: Size | None) -> bool:
    """Whether labels `[B, T]` have the positions of logits of this shape; a CTC model's transcripts don't."""
    if labels is None or logits is None or labels.ndim != 2 or len(logits) != 3:
        return True
    return logits[:-1] == labels.shape


def logits_read(output: Any, takes: Iterable[Take]) -> AnyLogits | None:
    """The logits of an output, or else those at the first of `takes` that finds some."""
    found = find_logits(output)
    if found is None:
        parts = (localised(part_of(output, take)) for take in takes if take is not None)
        found = next((part for part in parts if isinstance(part, KINDS)), None)
    return found


def look_at_numbers(name: str, logits: AnyLogits, where: Positions) -> None:
    """Raise for NaN or +inf at a position that counts."""
    at(logits, partial(_look_at, name, where))


def _look_at(name: str, where: Positions, x: Tensor) -> Tensor:
    there = x[:, :-1] if where.causal else x
    keep = where.keep
    if keep is None:
        keep = torch.ones(there.shape[: len(where.shape)], dtype=torch.bool, device=x.device)
    _checks.finite(name, there, keep)
    return x
