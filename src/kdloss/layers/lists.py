"""Find the lists of modules that a model runs one after the other."""

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
    """A list of modules. `of_stage`: it may be one of several stages. `attributes`: its modules are attributes."""

    name: str
    blocks: Modules
    of_stage: bool = False
    attributes: bool = False


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """All outermost lists of blocks of one class, by name.

    - A list is an `nn.ModuleList` or an `nn.Sequential` of modules that have submodules. It may also be the majority
      of the multi-layer modules in an `nn.Sequential`, if these are of one class: "features.*", without the modules
      before and after them.
    - The stages of a CNN, lists of blocks whose names differ in a number, form one list in their order: "layer*".
    - Lists inside a block (experts, branches) do not count.
    - Blocks that are attributes whose names differ in a number ("inception*") count if they have more weight tensors
      than any list.
    - Lists of single layers (stems, heads) count if there is nothing else.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=3, vocab_size=9))
    >>> {name: len(blocks) for name, blocks in block_lists(t5).items()}
    {'encoder.block': 3, 'decoder.block': 3}
    """
    found = [one for one in _lists(unwrap(model), "") if _one_class(one.blocks)]
    lists = _grouped(one for one in found if not one.attributes)
    composed = {name: blocks for name, blocks in lists.items() if any(map(_composed, blocks))}
    most = max(map(size, composed.values()), default=-1)
    attributes = {one.name: nn.ModuleList(one.blocks) for one in found if one.attributes}
    composed |= {name: blocks for name, blocks in attributes.items() if size(blocks) > most}
    return composed or {name: blocks for name, blocks in lists.items() if _has_parts(blocks[0])} or lists


def unequal_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules of different classes. They count as blocks only if the user names them."""
    return _grouped(one for one in _lists(unwrap(model), "") if not _one_class(one.blocks))


def sequences(model: nn.Module) -> dict[str, int]:
    """The length of each `nn.Sequential` with more than two layers that have weights, the largest one first."""
    found = {name: m for name, m in model.named_modules() if name and isinstance(m, nn.Sequential)}
    long = {name: m for name, m in found.items() if sum(size(layer) > 0 for layer in m) > 2}
    return {name: len(m) for name, m in sorted(long.items(), key=lambda named: -size(named[1]))}


def size(module: nn.Module) -> int:
    """The number of weight tensors in a module: largest for a model's trunk, whatever the widths of stem and head."""
    return sum(1 for _ in module.parameters())


def _grouped(lists: Iterable[Found]) -> dict[str, nn.ModuleList]:
    """Lists by name, with the stages of a CNN joined into one."""
    groups: dict[str, dict[str, Modules]] = {}
    for one in lists:
        groups.setdefault(re.sub(r"\d+", "*", one.name) if one.of_stage else one.name, {})[one.name] = one.blocks
    return {
        pattern if len(group) > 1 else next(iter(group)): nn.ModuleList(chain.from_iterable(group.values()))
        for pattern, group in groups.items()
    }


def _lists(module: nn.Module, name: str) -> Iterator[Found]:
    """All outermost lists, of one class or of several."""
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
            return  # lists further inside belong to its items
    attributes = list(_attribute_blocks(module, name))
    yield from attributes
    inside = set(chain.from_iterable(one.blocks for one in attributes))
    for key, child in module.named_children():
        if child not in inside:
            yield from _lists(child, f"{name}.{key}".lstrip("."))


def _attribute_blocks(module: nn.Module, name: str) -> Iterator[Found]:
    """Blocks that are attributes whose names differ in a number, not entries of a list."""
    groups: dict[str, list[nn.Module]] = {}
    for key, child in module.named_children():
        if not isinstance(module, LISTS) and re.search(r"\d", key) and _is_block(child):
            groups.setdefault(re.sub(r"\d+[a-z]?(?![a-z])", "*", key), []).append(child)
    for pattern, blocks in groups.items():
        if len(blocks) > 2:
            yield Found(f"{name}.{pattern}".lstrip("."), _main_class(blocks) or blocks, attributes=True)


def _holds_stage(block: nn.Module) -> bool:
    """Whether a module contains a CNN stage, among other modules."""
    return any(one.of_stage and any(map(_composed, one.blocks)) for one in _lists(block, ""))


def _stage(module: nn.Module) -> tuple[str, Lists] | None:
    """The blocks of a CNN stage: the module itself or the only trained module in it, with the path to it."""
    if isinstance(module, LISTS):
        return ("", module) if _equal(module) and _has_parts(module[0]) else None
    trained = [(n, m) for n, m in module.named_children() if any(True for _ in m.parameters())]
    if len(trained) == 1 and (inner := _stage(trained[0][1])) is not None and any(map(_composed, inner[1])):
        return f".{trained[0][0]}{inner[0]}", inner[1]
    return None


def _main_class(blocks: Modules) -> list[nn.Module]:
    """The blocks of the most common class, if it has the majority."""
    classes = Counter(type(unwrapped_block(block)) for block in blocks)
    kind, count = next(iter(classes.most_common(1)), (None, 0))
    return [b for b in blocks if type(unwrapped_block(b)) is kind] if count > max(2, len(blocks) / 2) else []


def _is_block(module: nn.Module) -> bool:
    """Whether a module is not a list and computes more than one layer."""
    return not isinstance(unwrapped_block(module), LISTS) and _composed(module)


def _composed(module: nn.Module) -> bool:
    """Whether a module has the weights of more than one layer; a convolution with its norm counts as one."""
    return _has_parts(module) and sum(x.ndim > 1 for x in chain(module.parameters(), module.buffers())) > 1


def _equal(blocks: Lists) -> bool:
    return _one_class(blocks) and (not isinstance(blocks, nn.Sequential) or _has_parts(blocks[0]))


def _one_class(blocks: Modules) -> bool:
    return len({type(unwrapped_block(block)) for block in blocks}) == 1


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in unwrapped_block(module).children())
