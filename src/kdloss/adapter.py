"""What `Distiller` has to know about a model; duck-typed, without importing transformers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from kdloss._capture import eagerly
from kdloss._inputs import named, taken_by
from kdloss.layers.names import attribute, modules_of, unwrap

__all__ = ["evaluating", "is_encoder_decoder", "named", "resharded", "takes_input", "without_cache"]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder: labels belong to the decoder, `attention_mask` to the encoder."""
    return bool(getattr(attribute(unwrap(model), "config"), "is_encoder_decoder", False))


def takes_input(model: Callable[..., Any], name: str, *, by_name: bool = False) -> bool:
    """Whether a model's forward takes this keyword; with `by_name` only if it names it, not by `**kwargs`."""
    names, anything = taken_by(model)
    return name in names or (anything and not by_name)


def without_cache(model: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with `use_cache=False`, so that a causal model stores no keys and values for a generation."""
    return {"use_cache": False, **inputs} if takes_input(model, "use_cache", by_name=True) else dict(inputs)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode for every module inside the `with`; each module's own mode is restored after it.

    A model from torch.export keeps the mode in which it was exported, and frozen TorchScript has no mode.
    """
    training = [module for module in modules_of(model) if getattr(module, "training", False)]
    return _evaluating(model, training) if training else nullcontext()


@contextmanager
def _evaluating(model: nn.Module, training: Sequence[nn.Module]) -> Iterator[None]:
    try:
        model.eval()
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
    """For passes that measure a model and change nothing: in eval mode, without gradient and uncompiled.

    Older torch keeps the weights that autocast cast in such a pass. In the step it would reuse these copies, which
    carry no gradient, so the cache is cleared.
    """
    try:
        with evaluating(model), torch.no_grad(), eagerly():
            yield
    finally:
        torch.clear_autocast_cache()
        resharded(model)


def resharded(model: nn.Module) -> None:
    """Shard a model under FSDP2 again, after a pass that ended early or had no backward pass."""
    reset = attribute(model, "reset_iter_state")
    if callable(reset):
        reset()
