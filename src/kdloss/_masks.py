"""Which positions count by a batch's masks: each mask is applied only at the positions that it describes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from kdloss import _checks
from kdloss._frames import at_positions
from kdloss._towers import Place
from kdloss.adapter import is_encoder_decoder
from kdloss.layers.layer_map import Layer
from kdloss.layers.names import unwrap
from kdloss.terms._feature_masks import FeatureMask, given_to
from kdloss.terms._outputs import class_indices, stand_at
from kdloss.terms._positions import Positions
from kdloss.terms._wheres import Wheres, both


@dataclass(frozen=True)
class Padding:
    """A batch's padding masks `[batch, time]`: of the model's inputs, and of its outputs.

    `of_text`: the mask of the inputs belongs to `input_ids`.
    """

    model: nn.Module
    inputs: Tensor | None
    outputs: Tensor | None
    of_text: bool

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Any]) -> "Padding":
        """The padding of a batch; masks with more dimensions are attention patterns and not used."""
        inputs = _boolean(batch.get("attention_mask"))
        outputs = _boolean(batch.get("decoder_attention_mask")) if is_encoder_decoder(model) else inputs
        ids = batch.get("input_ids")
        of_text = inputs is not None and isinstance(ids, Tensor) and ids.shape == inputs.shape
        return cls(model, inputs, outputs, of_text)

    def at(self, positions: Size, what: str, instead: str, *, of_inputs: bool = False) -> Tensor | None:
        """The mask at these positions; None if there is none for them. Raises if the mask can't be mapped to them."""
        mask = self.inputs if of_inputs else self.outputs
        if mask is None:
            return None
        try:
            return at_positions(self.model, mask, positions, of_text=self.of_text or mask is not self.inputs)
        except LookupError:
            name = "attention_mask" if mask is self.inputs else "decoder_attention_mask"
            raise ValueError(
                f"{name} {tuple(mask.shape)} doesn't stand at the positions of {what}, {tuple(positions)}, and no "
                f"length function of {type(unwrap(self.model)).__name__} maps it to them; write {instead}"
            ) from None


def all_masks(
    padding: Padding,
    logits: Size | None,
    on_features: list[str],
    labels: Any,
    mask: Tensor | None,
    feature_mask: Any,
    place: Place,
    *,
    causal: bool,
) -> dict[str, Any]:
    """The masks for the criterion: `mask`, at the positions of labels and logits, and `feature_mask`, by term."""
    positions, own = label_positions(labels, logits), None
    if positions is not None:
        own = _of_logits(padding, positions, logits, mask, place.beside_text)
    elif mask is not None and on_features:
        own = padding.outputs if padding.outputs is not None and padding.outputs.shape == mask.shape else None
    elif not on_features:
        own = padding.outputs
    found: dict[str, Any] = {"mask": mask, "attention_mask": own} if causal else {"mask": both(mask, own)}
    by_term = {name: _of_features(padding, name, positions, feature_mask, place, causal) for name in on_features}
    if on_features:
        rest = dict.fromkeys(feature_mask) if isinstance(feature_mask, Mapping) else {}
        found["feature_mask"] = rest | by_term
    elif feature_mask is not None:
        found["feature_mask"] = feature_mask
    return found


def positions_ahead(
    student: nn.Module,
    terms: Sequence[Any],
    inputs: Mapping[str, Any],
    labels: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    ignore_index: int,
) -> Positions | None:
    """The positions that count for any of the terms, if the logits stand at the labels; None if `mask` does not."""
    classes = class_indices(labels)
    shape = labels.shape if classes is not None or labels.ndim == 1 else labels.shape[:-1]
    if mask is not None and mask.shape != shape:
        return None
    place, logits = Place(lambda term, layer: "outputs", beside_text=True), Size((*shape, 1))
    masks = all_masks(Padding.of(student, inputs), logits, [], labels, mask, None, place, causal=causal)
    own = masks.get("attention_mask")
    at = partial(Positions.of, shape, mask=both(masks["mask"], own), causal=causal, ignore_index=ignore_index)
    return Wheres(at(classes), partial(at, None), own).widest(terms)


def label_positions(labels: Any, logits: Size | None) -> Size | None:
    """The positions of labels and logits; None if there are neither."""
    classes = class_indices(labels)
    if classes is not None and stand_at(classes, logits):
        return classes.shape
    return None if logits is None else logits[:-1]


def _of_logits(padding: Padding, positions: Size, logits: Any, mask: Tensor | None, beside_text: bool) -> Tensor | None:
    """The batch's own mask at the positions of labels and logits."""
    if mask is not None:
        _checks.mask(mask, positions, "labels and logits")
    there = positions if logits is None else logits[:-1]
    try:
        return padding.at(there, "the logits", f"mask=..., boolean, {tuple(there)}, True where one counts")
    except ValueError:
        if mask is None and not beside_text:
            raise
        return None  # the user's mask decides, or these logits don't belong to the text


def _of_features(
    padding: Padding, name: str, labels: Size | None, given: Any, place: Place, causal: bool
) -> FeatureMask:
    """A function of layer and positions for a term's features: their mask, and whether they are not at the labels'."""
    said, silent = given_to(name, given), isinstance(given, Mapping) and name in given and given[name] is None

    def at(layer: Layer, positions: Size) -> tuple[Tensor | None, bool]:
        if silent or (said is not None and said.shape != positions):
            return said, True
        side = place.side(name, layer)
        if side == "unknown" and said is None and padding.inputs is not None:
            raise ValueError(
                f"nothing tells whether attention_mask {tuple(padding.inputs.shape)} belongs to the features of "
                f"{name!r} at {layer!r}: the batch has inputs beside text, and no nn.Embedding of the student "
                f"reads input_ids; write feature_mask={{{name!r}: ...}}, boolean, {tuple(positions)}, or None to count "
                "all of them"
            )
        if side in ("elsewhere", "unknown"):
            return said, True
        if side == "outputs" and positions == labels and said is None:
            return None, False
        what = f"the features of {name!r} at {layer!r}"
        instead = f"feature_mask={{{name!r}: ...}}, boolean, {tuple(positions)}, or None to count all of them"
        try:
            found = padding.at(positions, what, instead, of_inputs=side == "inputs")
        except ValueError:
            if said is None:
                raise
            found = None
        if causal and labels is None and found is not None and found.ndim == 2:
            found = _after_real(found)
        return both(said, found), said is not None or side == "inputs"

    return at


def mask_of_features(padding: Padding, place: Place, mask: Tensor | None, positions: Size) -> Tensor | None:
    """The mask of features at these positions, from the user's mask and the batch's own."""
    if mask is not None:
        _checks.mask(mask, positions, "features")
    try:
        own, _ = _of_features(padding, "", None, None, place, False)(0, positions)
    except ValueError as error:
        if mask is None:
            raise ValueError(
                f"{str(error).partition('; write')[0]}; give the batch a 'mask', boolean, {tuple(positions)}"
            ) from None
        own = None  # the user's mask decides
    return both(mask, own)


def _after_real(mask: Tensor | None) -> Tensor | None:
    """Keep a position if it and the one before it count."""
    return None if mask is None else torch.cat([mask[:, :1], mask[:, 1:] & mask[:, :-1]], 1)


def _boolean(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
