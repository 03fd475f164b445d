"""Which tower of a model a feature belongs to: the one that reads the masked text, or another."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdloss._capture import Captured, Request
from kdloss._capture.located import Located
from kdloss.adapter import is_encoder_decoder, measuring
from kdloss.layers.layer_map import Layer, flat_names
from kdloss.layers.names import modules_of, unwrap

Again = Callable[[], Captured]
Side = Literal["inputs", "outputs", "elsewhere", "unknown"]


@dataclass(frozen=True)
class Place:
    """The side of a feature, by term and layer; `beside_text`: the batch has other inputs beside the masked text.

    "inputs": at the positions of the model's inputs (an encoder); "outputs": at those of its outputs; "elsewhere": of
    other inputs than the masked text; "unknown": nothing tells.
    """

    side: Callable[[str, Layer], Side]
    beside_text: bool = False


class Towers:
    """Remembers for each student which of its features depend on the text that the mask describes."""

    def __init__(self) -> None:
        self._follow: WeakKeyDictionary[nn.Module, dict[Any, bool | None]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Towers, ()

    def of(
        self, student: nn.Module, asked: Mapping[Any, Request], batch: Mapping[str, Any], located: Located, again: Again
    ) -> Place:
        """The side of each feature, by term and layer. `again` runs the student, if that has to be measured."""
        known = self._follow.setdefault(student, {})
        text = _text_beside_others(batch)
        if text is not None and any(key not in known for key in asked):
            known |= _measured(student, text, again)
        encoder = encoder_side(student)

        def side(term: str, layer: Layer) -> Side:
            keys = [(term, name) for name in flat_names([layer]) if (term, name) in asked]
            if text is not None and not all(known[key] for key in keys):
                return "unknown" if any(known[key] is None for key in keys) else "elsewhere"
            if not encoder:
                return "outputs"
            modules = [located.find(student, asked[key].name, asked[key].blocks) for key in keys]
            return "inputs" if modules and all(m in encoder for m in modules) else "outputs"

        return Place(side, text is not None)


def _text_beside_others(batch: Mapping[str, Any]) -> Tensor | None:
    """The text ids that the mask describes, if the batch also has pictures or sound; else None."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or ids.shape != mask.shape:
        return None
    others = (x for x in batch.values() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1)
    return ids if any(x.shape != ids.shape for x in others) else None


def _measured(student: nn.Module, ids: Tensor, again: Again) -> dict[Any, bool | None]:
    """Which features change when the text's embeddings change; None if no `nn.Embedding` reads the text."""
    with measuring(student):
        before = _run(student, again)
        with _other_embeddings(student, ids) as changed:
            after = _run(student, again)
    if not changed:
        return dict.fromkeys(before)
    return {key: not torch.allclose(x, after[key], rtol=1e-3, atol=1e-5, equal_nan=True) for key, x in before.items()}


def _run(student: nn.Module, again: Again) -> dict[Any, Tensor]:
    """The features of one pass, with a fixed random seed."""
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return dict(again().features)


@contextmanager
def _other_embeddings(student: nn.Module, ids: Tensor) -> Iterator[list[nn.Module]]:
    """Change the text's embeddings inside the `with`; gives the list of modules that computed them."""
    changed: list[nn.Module] = []

    def change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].shape != ids.shape:
            return None
        same = args[0] == ids  # a model may have replaced the ids of its pictures' places
        if not same.any() or len(torch.unique(args[0][~same])) > 1:
            return None
        changed.append(module)
        return 1 - 2 * output

    handles = [m.register_forward_hook(change) for m in student.modules() if isinstance(m, nn.Embedding)]
    try:
        yield changed
    finally:
        for handle in handles:
            handle.remove()


def encoder_side(model: nn.Module) -> set[nn.Module]:
    """The modules of an encoder-decoder at its inputs' positions: not decoder and head, nor modules around them."""
    if not is_encoder_decoder(model):
        return set()
    model = unwrap(model)
    decoder, head = (_asked(model, name) for name in ("get_decoder", "get_output_embeddings"))
    if decoder is None or decoder is model:
        return set()
    every, holders = modules_of(model), defaultdict[nn.Module | None, list[nn.Module]](list)
    for module in every:
        for inner in module._modules.values():
            holders[inner].append(module)
    around = [decoder]
    for module in around:
        around += (holder for holder in holders[module] if holder not in around)
    return {*every}.difference([head], modules_of(decoder), around)


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    method: Any = getattr(model, name, None)
    found = method() if callable(method) else None
    return found if isinstance(found, nn.Module) else None
