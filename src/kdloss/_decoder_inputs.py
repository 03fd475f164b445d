"""The decoder inputs of an encoder-decoder for a batch that has only labels, as its own forward makes them."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdloss._inputs import by_name
from kdloss.adapter import is_encoder_decoder, measuring, takes_input, without_cache
from kdloss.layers.names import unwrap
from kdloss.terms._outputs import find_logits

_GIVEN = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values"}


class DecoderInputs:
    """Makes decoder inputs by `prepare_decoder_input_ids_from_labels` if that gives the same logits, else gives labels.

    A model that gets labels computes its own loss, which needs full logits. Many models don't have the method (Whisper,
    M2M100), and in some the forward doesn't do the same (FSMT, token classifiers of T5Gemma 2).
    """

    def __init__(self) -> None:
        self._by_method: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecoderInputs, ()

    def of(self, model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
        """The inputs, with decoder inputs (or labels) added if the labels are text, not classes or boxes."""
        text = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
        if not text or not is_encoder_decoder(model):
            return dict(inputs)
        if not _GIVEN.isdisjoint(by_name(model, args, inputs)) or not takes_input(model, "labels", by_name=True):
            return dict(inputs)
        if model not in self._by_method:
            self._by_method[model] = _follows(model, args, inputs, labels)
        return {**inputs, **(_prepared(model, labels) if self._by_method[model] else {"labels": labels})}


def _prepared(model: nn.Module, labels: Tensor) -> dict[str, Any]:
    prepare: Any = unwrap(model).prepare_decoder_input_ids_from_labels
    return {"decoder_input_ids": prepare(labels.clone())}  # some models write into their argument


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _follows(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether a model gives the same logits for labels as for the decoder inputs that its method makes from them."""
    if not hasattr(unwrap(model), "prepare_decoder_input_ids_from_labels"):
        return False
    with measuring(model):
        ways = {"labels": labels}, _prepared(model, labels)
        both = [find_logits(model(*args, **without_cache(model, {**inputs, **way}))) for way in ways]
    own, prepared = both
    if not isinstance(own, Tensor) or not isinstance(prepared, Tensor) or own.shape != prepared.shape:
        return False
    return own.is_meta or torch.allclose(own, prepared, rtol=1e-3, atol=1e-3)
