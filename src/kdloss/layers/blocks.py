"""Finding the list of blocks a model is made of."""

from collections.abc import Sequence

from torch import nn

from kdloss.layers.names import resolve, unwrap


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every outermost `nn.ModuleList` of blocks of one class, by name.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=3, vocab_size=9))
    >>> {name: len(blocks) for name, blocks in block_lists(t5).items()}
    {'encoder.block': 3, 'decoder.block': 3}
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in unwrap(model).named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and len({type(m) for m in module}) == 1:
            found[name] = module
    return found


def find_blocks(model: nn.Module, blocks: str | None = None) -> nn.ModuleList:
    """The list of blocks of a model, in the order they run; block i is its i-th entry.

    `blocks` names the list where a model has several.

    Raises: ValueError when there is none or more than one, with what there is.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> len(find_blocks(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9))))
    3
    """
    kind = type(unwrap(model)).__name__
    if blocks is not None:
        module = resolve(model, blocks)
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
            raise ValueError(f"blocks={blocks!r} of {kind} is not a list of blocks: {type(module)}")
        return nn.ModuleList(module)
    found = block_lists(model)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        lists = {name: len(module) for name, module in found.items()}
        raise ValueError(
            f"{kind} has {len(found)} lists of blocks, {lists}; say which: blocks={next(iter(lists))!r}"
        )
    names = [name for name, _ in unwrap(model).named_children()]
    raise ValueError(
        f"{kind} has no nn.ModuleList of equal blocks, only {names}; name the modules instead, "
        f"for example layers=[{names[0] if names else 'name'!r}], or the list itself by blocks="
    )


def block_indices(model: nn.Module, names: Sequence[str], blocks: str | None = None) -> list[int]:
    """Indices of blocks given by name; empty when one of the names is not a block."""
    try:
        found = list(find_blocks(model, blocks))
    except ValueError:
        return []
    modules = [resolve(model, name) for name in names]
    return [found.index(m) for m in modules] if all(m in found for m in modules) else []


def kept_blocks(model: nn.Module, blocks: str | None = None) -> list[int] | None:
    """The teacher's blocks that a student was made of by `kdloss.keep_blocks`."""
    kept = getattr(getattr(unwrap(model), "config", None), "kept_blocks", None)
    if kept is None:
        return None
    return list(kept[blocks]) if blocks is not None else list(next(iter(kept.values())))


def width(model: nn.Module) -> int | None:
    """The width of a Hugging Face model's hidden states."""
    return getattr(getattr(unwrap(model), "config", None), "hidden_size", None)
