"""A padding mask at the positions of what a model makes of its inputs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss.layers.names import unwrap


def at_positions(model: nn.Module, mask: Tensor, positions: Size, *, of_text: bool) -> Tensor | None:
    """A mask `[B, T]` where logits or features stand; None for those that are one per example.

    Where there are fewer positions, as of a speech model's frames, the model's own length function says how many of
    an example count; not of text, of which it says nothing. An attention map's `[B, T, T]` count where query and key
    do.

    Raises: LookupError where nothing brings it there.
    """
    if positions == mask.shape:
        return mask
    if positions == mask.shape[:1]:
        return None
    if positions == (*mask.shape, mask.shape[1]):
        return mask.unsqueeze(-1) & mask.unsqueeze(-2)
    if len(positions) == 2 and positions[0] == len(mask) and not of_text:
        for lengths in _length_functions(model):
            if lengths(torch.tensor([mask.shape[1]])).tolist() == [positions[1]]:  # no mask's numbers are looked at
                counted = lengths(mask.sum(-1)).to(mask.device)
                return torch.arange(positions[1], device=mask.device) < counted.unsqueeze(-1)
    raise LookupError


def _length_functions(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Each model's in this one that says how many frames it makes of so many samples, without and with adapters."""
    for module in unwrap(model).modules():
        own: Any = getattr(module, "_get_feat_extract_output_lengths", None)
        if callable(own):
            yield partial(_each, own)
            if getattr(getattr(module, "config", None), "add_adapter", False):
                yield partial(_each, partial(own, add_adapter=False))


def _each(function: Callable[[Tensor], Any], lengths: Tensor) -> Tensor:
    """A function of lengths, or of one at a time; of one that gives something else there is no number."""
    try:
        return torch.as_tensor(function(lengths)).expand(lengths.shape)
    except (RuntimeError, TypeError, ValueError):  # it wants one length, as a number
        pass
    try:
        return torch.tensor([int(function(n)) for n in lengths.cpu()])
    except (RuntimeError, TypeError, ValueError):
        return lengths.new_empty(0)
