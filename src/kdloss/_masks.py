"""Which positions of a batch count, as far as its masks say."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss._capture import Captured
from kdloss.adapter import is_encoder_decoder
from kdloss.terms import Plan
from kdloss.terms._outputs import find_logits


def all_masks(
    student: nn.Module, seen: Captured, plan: Plan, inputs: dict[str, Any], labels: Any, mask: Tensor | None
) -> dict[str, Any]:
    """The mask of the labels' positions, and those of features that stand elsewhere, by term."""
    logits = find_logits(seen.output)
    positions = None if logits is None else logits.shape[:-1]
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        positions = labels.shape
    own: dict[str, Tensor | None] = {}
    for name, reads in plan.reads.items():
        if reads.pairs:
            first = next(iter(seen.of(name).values())) if "encoder" in (reads.blocks or "") else None
            own[name] = masks(student, inputs, mask, positions, first)[1]
    settings: dict[str, Any] = {"mask": masks(student, inputs, mask, positions, None)[0]}
    return settings | {"feature_mask": own} if own else settings


def masks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    mask: Tensor | None,
    positions: Size | None,
    encoder_features: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the labels' positions, and that of features which stand elsewhere.

    `positions` is None where there are neither labels nor logits: the features' are all there is.
    """
    attention = _boolean(inputs.get("attention_mask"))
    if is_encoder_decoder(model):
        feature_mask = attention
        if encoder_features is None:
            feature_mask = None
        elif attention is None:
            feature_mask = encoder_features.new_ones(encoder_features.shape[:-1], dtype=torch.bool)
        decoder = _boolean(inputs.get("decoder_attention_mask"))
        return _both(mask, decoder), feature_mask
    if attention is None or positions is None or attention.shape == positions:
        return _both(mask, attention), None
    return mask, attention


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A padding mask `[batch, time]`; masks of more dimensions say what attends to what."""
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first & second
