"""What an encoder-decoder's decoder reads where a batch has labels alone, as its own forward makes it."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdloss.adapter import is_encoder_decoder, measuring, takes_input, without_cache
from kdloss.layers.names import unwrap
from kdloss.terms._outputs import find_logits

_GIVEN = {"decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values"}


class DecoderInputs:
    """The method that collators call, where it is seen to give the same logits; else the labels themselves.

    Given labels a model makes a loss by itself, at the price of whole logits. Many have no such method (Whisper,
    M2M100), and some have one that their forward doesn't follow (FSMT, token classifiers of T5Gemma 2).
    """

    def __init__(self) -> None:
        self._by_method: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecoderInputs, ()

    def of(self, model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
        """The inputs and, for labels that are text, what the decoder needs; classes and boxes are no text."""
        text = isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()
        if not text or not is_encoder_decoder(model):
            return dict(inputs)
        if not _GIVEN.isdisjoint(inputs) or not takes_input(model, "labels", by_name=True):
            return dict(inputs)
        if model not in self._by_method:
            self._by_method[model] = _follows(model, args, inputs, labels)
        return {**inputs, **(_prepared(model, labels) if self._by_method[model] else {"labels": labels})}


def _prepared(model: nn.Module, labels: Tensor) -> dict[str, Any]:
    prepare: Any = unwrap(model).prepare_decoder_input_ids_from_labels
    return {"decoder_input_ids": prepare(labels.clone())}  # some write into what they are given


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _follows(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether a model's forward reads what its method makes: the same logits, once each way."""
    if not hasattr(unwrap(model), "prepare_decoder_input_ids_from_labels"):
        return False
    with measuring(model):
        ways = {"labels": labels}, _prepared(model, labels)
        both = [find_logits(model(*args, **without_cache(model, {**inputs, **way}))) for way in ways]
    own, prepared = both
    if not isinstance(own, Tensor) or not isinstance(prepared, Tensor) or own.shape != prepared.shape:
        return False
    return own.is_meta or torch.allclose(own, prepared, rtol=1e-3, atol=1e-3)
