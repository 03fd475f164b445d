"""A padding mask mapped to the positions of a model's logits or features."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss.layers.names import unwrap


def at_positions(model: nn.Module, mask: Tensor, positions: Size, *, of_text: bool) -> Tensor | None:
    """A mask `[B, T]` at the positions of logits or features; None if there is one position per example.

    If there are fewer positions, such as a speech model's frames, the model's own length function tells how many of
    each example count; it isn't asked about text. An entry of an attention map `[B, T, T]` counts if its query and its
    key count.

    Raises: LookupError if the mask can't be mapped to the positions.
    """
    if positions == mask.shape:
        return mask
    if positions == mask.shape[:1]:
        return None
    if positions == (*mask.shape, mask.shape[1]):
        return mask.unsqueeze(-1) & mask.unsqueeze(-2)
    if len(positions) == 2 and positions[0] == len(mask) and not of_text:
        for lengths in _length_functions(model):
            if lengths(torch.tensor([mask.shape[1]])).tolist() == [positions[1]]:  # without a device sync
                counted = lengths(mask.sum(-1)).to(mask.device)
                return torch.arange(positions[1], device=mask.device) < counted.unsqueeze(-1)
    raise LookupError


def _length_functions(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The length functions (samples to frames) of this model and the models inside it, with and without adapters."""
    for module in unwrap(model).modules():
        own: Any = getattr(module, "_get_feat_extract_output_lengths", None)
        if callable(own):
            yield partial(_each, own)
            if getattr(getattr(module, "config", None), "add_adapter", False):
                yield partial(_each, partial(own, add_adapter=False))


def _each(function: Callable[[Tensor], Any], lengths: Tensor) -> Tensor:
    """Call a length function on all lengths, or on one at a time; empty if it returns anything but numbers."""
    try:
        return torch.as_tensor(function(lengths)).expand(lengths.shape)
    except (RuntimeError, TypeError, ValueError):  # it takes a single number
        pass
    try:
        return torch.tensor([int(function(n)) for n in lengths.cpu()])
    except (RuntimeError, TypeError, ValueError):
        return lengths.new_empty(0)
