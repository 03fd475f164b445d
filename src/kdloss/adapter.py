"""What `Distiller` reads from a model and its batch; duck-typed, without importing transformers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss._inputs import named, taken_by
from kdloss.layers.names import unwrap

__all__ = ["evaluating", "is_encoder_decoder", "masks", "named", "resharded", "takes_input", "without_cache"]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are the decoder's, and `attention_mask` the encoder's."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def takes_input(model: nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Whether a model's forward takes this keyword; `by_name` leaves out what `**kwargs` may be for."""
    names, anything = taken_by(model)
    return name in names or (anything and not by_name)


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that keep a causal model from storing keys and values for a generation that won't come."""
    return {"use_cache": False, **inputs} if takes_input(model, "use_cache", by_name=True) else dict(inputs)


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside the `with`; each one's own mode behind it.

    What torch.export made has the mode that it was exported in, and frozen TorchScript has none.
    """
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    try:
        model.eval()
    except NotImplementedError:
        for module in modes:
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def resharded(model: nn.Module) -> None:
    """Put a model under FSDP2 back into shards: a pass that ended early, or without backward, doesn't."""
    reset = getattr(model, "reset_iter_state", None)
    if callable(reset):
        reset()


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A padding mask `[batch, time]`; masks of more dimensions say what attends to what."""
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first & second
