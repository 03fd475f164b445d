"""Lists of modules that a model runs one after the other."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from torch import nn

from kdloss.layers.names import unwrap, unwrapped_block

Lists = nn.ModuleList | nn.Sequential
LISTS = (nn.ModuleList, nn.Sequential)
Modules = list[nn.Module] | nn.ModuleList | nn.Sequential


class Found(NamedTuple):
    """A list of modules: whether it may be one stage of several, or is no list but modules beside each other."""

    name: str
    blocks: Modules
    of_stage: bool = False
    beside: bool = False


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every outermost list of blocks of one class, by name.

    A list is an `nn.ModuleList`, or an `nn.Sequential` of modules that have parts, or in which most of those
    with more than one layer are of one class: these are "features.*", without what stands before and after.
    A CNN's stages, lists of blocks whose names differ by their numbers, are one list, in their order:
    "layer*". What stands inside a block (experts, branches) is no list of blocks. Blocks beside each other
    whose names differ by their numbers ("inception*") count where they hold more than any list, and lists
    of single layers (stems, heads) where there is nothing else.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=3, vocab_size=9))
    >>> {name: len(blocks) for name, blocks in block_lists(t5).items()}
    {'encoder.block': 3, 'decoder.block': 3}
    """
    found = [one for one in _lists(unwrap(model), "") if _one_class(one.blocks)]
    lists = _grouped(one for one in found if not one.beside)
    composed = {name: blocks for name, blocks in lists.items() if any(map(_composed, blocks))}
    most = max(map(size, composed.values()), default=-1)
    beside = {one.name: nn.ModuleList(one.blocks) for one in found if one.beside}
    composed |= {name: blocks for name, blocks in beside.items() if size(blocks) > most}
    return composed or {name: blocks for name, blocks in lists.items() if _has_parts(blocks[0])} or lists


def unequal_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules that are not of one class; they count as blocks where somebody says so."""
    return _grouped(one for one in _lists(unwrap(model), "") if not _one_class(one.blocks))


def sequences(model: nn.Module) -> dict[str, int]:
    """How many single layers are in each `nn.Sequential` of more than two that have weights, the most first."""
    rows = {name: m for name, m in model.named_modules() if name and isinstance(m, nn.Sequential)}
    long = {name: row for name, row in rows.items() if sum(size(layer) > 0 for layer in row) > 2}
    return {name: len(row) for name, row in sorted(long.items(), key=lambda named: -size(named[1]))}


def size(module: nn.Module) -> int:
    """How many weights a module has: a trunk has more than what stands before and behind it, whatever their widths."""
    return sum(1 for _ in module.parameters())


def _grouped(lists: Iterable[Found]) -> dict[str, nn.ModuleList]:
    """Lists by name; the stages of a CNN are one."""
    groups: dict[str, dict[str, Modules]] = {}
    for one in lists:
        groups.setdefault(re.sub(r"\d+", "*", one.name) if one.of_stage else one.name, {})[one.name] = one.blocks
    return {
        pattern if len(group) > 1 else next(iter(group)): nn.ModuleList(chain.from_iterable(group.values()))
        for pattern, group in groups.items()
    }


def _lists(module: nn.Module, name: str) -> Iterator[Found]:
    """Outermost lists, equal or not."""
    if isinstance(module, LISTS) and len(module):
        stages = [stage for item in module if (stage := _stage(item)) is not None]
        if len(stages) == len(module) and _one_class(module):
            for i, (path, found) in enumerate(stages):
                yield Found(f"{name}.{i}{path}".lstrip("."), found, of_stage=True)
            return
        if _equal(module):
            yield Found(name, module, of_stage=isinstance(module, nn.Sequential))
            return
        blocks = [item for item in module if _is_block(item)]
        if isinstance(module, nn.ModuleList) or (len(blocks) > 2 and not all(map(_holds_stage, blocks))):
            main = _main_class(blocks) if isinstance(module, nn.Sequential) else []
            yield Found(f"{name}.*".lstrip("."), main) if main else Found(name, module)
            return  # what is in there are parts of its items
    beside = list(_beside(module, name))
    yield from beside
    inside = set(chain.from_iterable(one.blocks for one in beside))
    for key, child in module.named_children():
        if child not in inside:
            yield from _lists(child, f"{name}.{key}".lstrip("."))


def _beside(module: nn.Module, name: str) -> Iterator[Found]:
    """Blocks that are no list, but attributes whose names differ by their numbers."""
    groups: dict[str, list[nn.Module]] = {}
    for key, child in module.named_children():
        if not isinstance(module, LISTS) and re.search(r"\d", key) and _is_block(child):
            groups.setdefault(re.sub(r"\d+[a-z]?(?![a-z])", "*", key), []).append(child)
    for pattern, blocks in groups.items():
        if len(blocks) > 2:
            yield Found(f"{name}.{pattern}".lstrip("."), _main_class(blocks) or blocks, beside=True)


def _holds_stage(block: nn.Module) -> bool:
    """Whether there is a stage of a CNN in a module, beside other things."""
    return any(one.of_stage and any(map(_composed, one.blocks)) for one in _lists(block, ""))


def _stage(module: nn.Module) -> tuple[str, Lists] | None:
    """The list of blocks that a stage of a CNN is, or holds and nothing else; with its name in there."""
    if isinstance(module, LISTS):
        return ("", module) if _equal(module) and _has_parts(module[0]) else None
    trained = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
    if len(trained) == 1 and (inner := _stage(trained[0][1])) is not None and any(map(_composed, inner[1])):
        return f".{trained[0][0]}{inner[0]}", inner[1]
    return None


def _main_class(blocks: Modules) -> list[nn.Module]:
    """The blocks of the class that most are of, if one is."""
    classes = Counter(type(unwrapped_block(block)) for block in blocks)
    kind, count = next(iter(classes.most_common(1)), (None, 0))
    return [b for b in blocks if type(unwrapped_block(b)) is kind] if count > max(2, len(blocks) / 2) else []


def _is_block(module: nn.Module) -> bool:
    """Whether a module by itself, no list, computes more than one layer."""
    return not isinstance(unwrapped_block(module), LISTS) and _composed(module)


def _composed(module: nn.Module) -> bool:
    """Whether a module has more than one layer's weights; a convolution with its norm is one."""
    return _has_parts(module) and sum(x.ndim > 1 for x in chain(module.parameters(), module.buffers())) > 1


def _equal(blocks: Lists) -> bool:
    return _one_class(blocks) and (not isinstance(blocks, nn.Sequential) or _has_parts(blocks[0]))


def _one_class(blocks: Modules) -> bool:
    return len({type(unwrapped_block(block)) for block in blocks}) == 1


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in unwrapped_block(module).children())
