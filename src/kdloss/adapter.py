"""What `Distiller` reads from a model and its batch; duck-typed, without importing transformers."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss.layers.names import unwrap


def is_causal(model: nn.Module) -> bool:
    """Whether Hugging Face shifts this model's labels: the logits at t belong to label t+1."""
    model = unwrap(model)
    by_loss = getattr(model, "loss_type", None) == "ForCausalLM"
    return by_loss or type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are the decoder's, and `attention_mask` the encoder's."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def with_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None) -> dict[str, Any]:
    """An encoder-decoder's decoder inputs, which it makes itself only where it is given labels."""
    text = isinstance(labels, Tensor)  # a detector's are a list of boxes and classes
    if not text or not is_encoder_decoder(model) or "decoder_input_ids" in inputs:
        return dict(inputs)
    prepare: Any = unwrap(model).prepare_decoder_input_ids_from_labels
    return {**inputs, "decoder_input_ids": prepare(labels)}


def named(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without what is a teacher's: what the forward doesn't name, or what begins with "teacher_"."""
    known = inspect.signature(unwrap(model).forward).parameters.values()
    names = {p.name for p in known}
    anything = any(p.kind is p.VAR_KEYWORD for p in known)
    return {k: v for k, v in inputs.items() if k in names or (anything and not k.startswith("teacher_"))}


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that keep a causal model from storing keys and values for a generation that won't come."""
    known = inspect.signature(unwrap(model).forward).parameters
    return {"use_cache": False, **inputs} if "use_cache" in known else dict(inputs)


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
    """Eval mode for every module inside the `with`; each one's own mode behind it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
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
