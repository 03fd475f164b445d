"""Finding the list of blocks a model is made of."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from kdloss.layers.names import resolve, unwrap, unwrapped_block

Lists = nn.ModuleList | nn.Sequential


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every outermost list of blocks of one class, by name.

    A list is an `nn.ModuleList`, or an `nn.Sequential` of modules that have parts. A CNN's stages,
    lists of blocks whose names differ by their numbers, are one list, in their order: "layer*". What
    stands inside a block (experts, adapters) is no list of blocks, and lists of single layers
    (heads) count only where there is nothing else.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=3, vocab_size=9))
    >>> {name: len(blocks) for name, blocks in block_lists(t5).items()}
    {'encoder.block': 3, 'decoder.block': 3}
    """
    groups: dict[str, dict[str, Lists]] = {}
    for name, found, of_stage in _lists(unwrap(model), ""):
        groups.setdefault(re.sub(r"\d+", "*", name) if of_stage else name, {})[name] = found
    lists = {
        pattern if len(group) > 1 else next(iter(group)): nn.ModuleList(
            block for stage in group.values() for block in stage
        )
        for pattern, group in groups.items()
    }
    return {name: found for name, found in lists.items() if _has_parts(found[0])} or lists


def find_blocks(model: nn.Module, blocks: str | None = None) -> nn.ModuleList:
    """The list of blocks of a model, in the order they run; block i is its i-th entry.

    Found are an `nn.ModuleList` of blocks of one class, and the residual blocks of a CNN's stages.
    `blocks` names the list where a model has several.

    Raises: ValueError when there is none or more than one, with what there is.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> len(find_blocks(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9))))
    3
    """
    kind = type(unwrap(model)).__name__
    if blocks is not None and "*" not in blocks:
        module = resolve(model, blocks)
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            raise ValueError(f"blocks={blocks!r} of {kind} is not a list of blocks: {type(module)}")
        return nn.ModuleList(module)
    found = block_lists(model)
    if blocks in found:
        return found[blocks]
    lists = {name: len(module) for name, module in found.items()}
    if blocks is not None:
        raise ValueError(f"{kind} has no stages of blocks called {blocks!r}; it has {lists}")
    if not found:
        raise ValueError(f"{kind} has no nn.ModuleList of equal blocks, only {_what_else(unwrap(model))}")
    if len(found) > 1:
        raise ValueError(f"{kind} has {len(found)} lists of blocks, {lists}; say which: blocks={next(iter(lists))!r}")
    return next(iter(found.values()))


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, Lists, bool]]:
    """Outermost lists of equal blocks, with their names, and whether each may be one stage of several."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
        stages = [stage for item in module if (stage := _stage(item)) is not None]
        if len(stages) == len(module) and _one_class(module):
            for i, (path, found) in enumerate(stages):
                yield f"{name}.{i}{path}".lstrip("."), found, True
            return
        if _equal(module):
            yield name, module, isinstance(module, nn.Sequential)
            return
        if isinstance(module, nn.ModuleList):  # what is in there are parts of its items
            return
    for key, child in module.named_children():
        yield from _lists(child, f"{name}.{key}".lstrip("."))


def _stage(module: nn.Module) -> tuple[str, Lists] | None:
    """The list of blocks that a stage of a CNN is, or holds and nothing else; with its name in there."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return ("", module) if _equal(module) and _has_parts(module[0]) else None
    trained = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
    if len(trained) == 1 and (inner := _stage(trained[0][1])) is not None:
        return f".{trained[0][0]}{inner[0]}", inner[1]
    return None


def _equal(blocks: Lists) -> bool:
    return _one_class(blocks) and (not isinstance(blocks, nn.Sequential) or _has_parts(blocks[0]))


def _one_class(blocks: Lists) -> bool:
    return len({type(unwrapped_block(block)) for block in blocks}) == 1


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in unwrapped_block(module).children())


def _what_else(model: nn.Module) -> str:
    """What a model without a list of equal blocks has, and how to use it."""
    mixed: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in mixed):
            mixed[name] = len(module)
    names = [name for name, _ in model.named_children()]
    there = f"{names} and lists of unequal modules, {mixed}" if mixed else f"{names}"
    return (
        f"{there}; name the modules instead, for example layers=[{names[0] if names else 'name'!r}], or "
        f"the list itself by blocks={next(iter(mixed), 'name')!r}"
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
