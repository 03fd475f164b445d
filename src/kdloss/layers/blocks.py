"""Find the list of blocks of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kdloss.layers.graph import called, is_graph
from kdloss.layers.lists import LISTS, block_lists, sequences, size, unequal_lists
from kdloss.layers.names import resolve, split_name, unwrap


def find_blocks(model: nn.Module, blocks: str | None = None) -> nn.ModuleList:
    """Find the blocks of a `model`, in the order they run; block i is entry i (0-based).

    It finds an `nn.ModuleList` of blocks of one class, the blocks of one class in an `nn.Sequential`, and the
    residual blocks in a CNN's stages. If a Hugging Face model has several stacks, it returns the blocks of the
    decoder, which the logits come from: the decoder of an encoder-decoder, or the language model behind an image or
    audio encoder. `blocks` names another list, or a list of modules of different classes.

    Raises: ValueError if the model has no list of blocks, or several to choose from; the message lists what it has.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> len(find_blocks(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9))))
    3
    """
    kind = type(unwrap(model)).__name__
    if blocks is not None and "*" not in blocks:
        module = resolve(model, blocks)
        if not isinstance(module, LISTS) or len(module) == 0:
            raise ValueError(f"blocks={blocks!r} of {kind} is not a list of blocks: {type(module)}")
        return nn.ModuleList(module)
    found = block_lists(model)
    if blocks is None:
        return found[chosen_list(model, found)]
    there = unequal_lists(model) | found
    if blocks not in there:
        lists = {name: len(module) for name, module in there.items()}
        raise ValueError(f"{kind} has no stages of blocks called {blocks!r}; it has {lists}")
    return there[blocks]


def chosen_list(model: nn.Module, found: Mapping[str, nn.ModuleList]) -> str:
    """The name of the only list of blocks, or of the decoder's list.

    Raises: ValueError if there is none, or several to choose from; the message names the likeliest one first.
    """
    kind, unequal = type(unwrap(model)).__name__, unequal_lists(model)
    if not found:
        raise ValueError(f"{kind} has no nn.ModuleList of equal blocks: {_what_else(unwrap(model), unequal)}")
    decoder = decoder_lists(model, found)
    if len(decoder) == 1:
        return decoder[0]
    larger = {name: x for name, x in unequal.items() if size(x) > max(map(size, found.values()))}
    if len(found) == 1 and not larger:
        return next(iter(found))
    lists = {**found, **larger}
    first = sorted(lists, key=lambda name: (name not in decoder, -size(lists[name])))
    raise ValueError(
        f"{kind} has {len(lists)} lists of blocks, { ({name: len(lists[name]) for name in first}) }; say which: "
        f"blocks={first[0]!r}"
    )


def decoder_lists(model: nn.Module, found: Mapping[str, nn.ModuleList]) -> list[str]:
    """The lists inside a Hugging Face model's decoder (`get_decoder()`), if the logits are made from its output."""
    model = unwrap(model)
    ask: Any = getattr(model, "get_decoder", None)
    head: Any = getattr(model, "get_output_embeddings", None)
    from_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) or (callable(head) and head())
    if not callable(ask) or not from_decoder or not isinstance(decoder := ask(), nn.Module):
        return []
    inside = set(decoder.modules())
    return [name for name, blocks in found.items() if inside.issuperset(blocks)]


def _what_else(model: nn.Module, unequal: Mapping[str, nn.ModuleList]) -> str:
    """For an error: what a model without a list of equal blocks has instead, and how to use it."""
    if is_graph(model):
        names = called(model, model)
        return (
            f"it was traced by torch.fx, which keeps no lists. Name modules that its graph calls: layers={names[-2:]}, "
            f"of {names}"
        )
    names = [name for name, _ in model.named_children()]
    lengths = {name: len(found) for name, found in sorted(unequal.items(), key=lambda named: -size(named[1]))}
    if lengths:
        there, how = (
            f"{names} and lists of unequal modules, {lengths}",
            f"a list as it is by blocks={next(iter(lengths))!r}",
        )
    elif layers := sequences(model):
        there, how = f"{names} and layers in a row, {layers}", f"a row of layers by blocks={next(iter(layers))!r}"
    else:
        there, how = f"{names}", ""
    by_name = f"name the modules instead, for example layers=[{names[0] if names else 'name'!r}], pairing='same'"
    return f"there is {there}; take {how}, or {by_name}" if how else f"there is {there}; {by_name}"


def block_indices(model: nn.Module, names: Sequence[str], blocks: str | None = None) -> list[int]:
    """The block indices of named modules; empty if one of the names is not a block."""
    try:
        found = list(find_blocks(model, blocks))
    except ValueError:
        return []
    modules = [resolve(model, name) for name in names]
    if any(split_name(name)[1] for name in names):
        return []
    return [found.index(m) for m in modules] if all(m in found for m in modules) else []


def kept_blocks(model: nn.Module, blocks: str | None = None) -> list[int] | None:
    """The indices of the teacher's blocks from which `kdloss.keep_blocks` made this student; None for other models."""
    kept = getattr(getattr(unwrap(model), "config", None), "kept_blocks", None)
    if kept is None:
        return None
    return list(kept[chosen_list(model, block_lists(model)) if blocks is None else blocks])


def width(model: nn.Module) -> int | None:
    """The width of a Hugging Face model's hidden states."""
    return getattr(getattr(unwrap(model), "config", None), "hidden_size", None)
