"""What `Distiller` reads from a model and its batch; duck-typed, without importing transformers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdloss._capture import eagerly
from kdloss._inputs import named, taken_by
from kdloss.layers.names import attribute, modules_of, unwrap

__all__ = ["evaluating", "is_encoder_decoder", "named", "resharded", "takes_input", "without_cache"]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are the decoder's, and `attention_mask` the encoder's."""
    return bool(getattr(attribute(unwrap(model), "config"), "is_encoder_decoder", False))


def takes_input(model: nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Whether a model's forward takes this keyword; `by_name` leaves out what `**kwargs` may be for."""
    names, anything = taken_by(model)
    return name in names or (anything and not by_name)


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that keep a causal model from storing keys and values for a generation that won't come."""
    return {"use_cache": False, **inputs} if takes_input(model, "use_cache", by_name=True) else dict(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside the `with`; each one's own mode behind it.

    What torch.export made has the mode that it was exported in, and frozen TorchScript has none.
    """
    training = [module for module in modules_of(model) if getattr(module, "training", False)]
    try:
        model.eval() if training else None
    except NotImplementedError:
        for module in training:
            module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """For passes that show something of a model and leave nothing: in eval mode, without gradient or graph.

    Older torch keeps what autocast cast in them, and would take it in the step, where its gradient would end.
    """
    try:
        with evaluating(model), torch.no_grad(), eagerly():
            yield
    finally:
        torch.clear_autocast_cache()
        resharded(model)


def resharded(model: nn.Module) -> None:
    """Put a model under FSDP2 back into shards: a pass that ended early, or without backward, doesn't."""
    reset = attribute(model, "reset_iter_state")
    if callable(reset):
        reset()
