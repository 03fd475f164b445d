"""Logits in what a model returned."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._capture import Captured, Take
from kdloss._capture.take import described, follow
from kdloss.targets.kinds import KINDS, AnyLogits, at
from kdloss.targets.sharded import localised
from kdloss.terms._positions import Positions


def returned(output: Any) -> Any:
    """What the model itself returned, behind what was captured of it."""
    return output.output if isinstance(output, Captured) else output


def part_of(output: Any, take: Take) -> Any:
    """What stands at an index, a key or a path, or what a function finds; None where nothing does."""
    return take(output) if callable(take) else follow(output, () if take is None else take)


def logits_of(output: Any, whose: str, take: Take = None) -> Any:
    """Logits from a tensor, any other kind of logits, a Hugging Face output, a captured one, or by `take`."""
    output = returned(output)
    if take is not None:
        found = localised(part_of(output, take))
        if isinstance(found, KINDS):
            return found
        raise TypeError(f"take={take!r} finds no logits in the {whose}'s output, {described(output)}")
    logits = find_logits(output)
    if logits is None:
        raise TypeError(
            f"the {whose}'s logits are needed: pass a tensor, or an output or dict that has logits, or say "
            f"where they are by take=..., got {type(output).__name__}"
        )
    return logits


def find_logits(output: Any) -> AnyLogits | None:
    """The logits, where there are any."""
    output = localised(output)
    if isinstance(output, KINDS):
        return output
    output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    output = localised(output)
    return output if isinstance(output, KINDS) else None


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
