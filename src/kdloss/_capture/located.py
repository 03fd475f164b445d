"""Look up modules once per model."""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from kdloss._capture.why import dropped
from kdloss._layout import Evident
from kdloss.layers import find_blocks
from kdloss.layers.drop import layer_drop
from kdloss.layers.layer_map import Name
from kdloss.layers.names import at_path, resolve, split_name

_LISTS = (nn.ModuleList, nn.Sequential)


def find(model: nn.Module, name: Name, blocks: str | None = None) -> nn.Module:
    """The module with this name, or the block with this index in the list that `blocks` names.

    Raises: ValueError if it does not exist.
    """
    return resolve(model, name) if isinstance(name, str) else _numbered(find_blocks(model, blocks), name)


class Located:
    """`find` with a memory: for every model it keeps the paths of modules and of the lists that contain the blocks.

    If a list also contains other modules, it keeps the paths of the blocks instead. It returns the module that is at a
    path now, even if that was wrapped, replaced or inserted since. A path that no longer exists is looked up again.
    `evident` remembers what modules show about their axes. Models are referenced weakly, and copies of a `Located`
    start empty.
    """

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
        self._steady: WeakKeyDictionary[nn.Module, set[tuple[Name, str | None]]] = WeakKeyDictionary()
        self.evident = Evident()
        self._lists: WeakKeyDictionary[nn.Module, dict[str | None, tuple[list[str], bool]]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Located, ()

    def find(self, model: nn.Module, name: Name, blocks: str | None = None) -> nn.Module:
        """The module that the function `find` would return."""
        return self._named(model, name) if isinstance(name, str) else _numbered(self._blocks(model, blocks), name)

    def refuse_dropped(self, model: nn.Module, module: nn.Module, name: Name, blocks: str | None) -> None:
        """Raise for a block that the model skips at random in training mode (LayerDrop); checked once for each name."""
        known = self._steady.setdefault(model, set())
        if not model.training or (name, blocks) in known:
            return
        if (drop := layer_drop(model, module)) is not None:
            raise ValueError(f"{name!r} can't be captured in every step: {dropped(model, *drop)}")
        known.add((name, blocks))

    def _named(self, model: nn.Module, name: str) -> nn.Module:
        name, _ = split_name(name)
        known = self._modules.setdefault(model, {})
        if name in known and (there := at_path(model, known[name])) is not None:
            return there
        found = resolve(model, name)
        paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is found]
        # A module at several paths is remembered at the one that ends in its name: the others may change later.
        if paths := [p for p in paths if f".{p}".endswith(f".{name}")] or (paths if len(paths) == 1 else []):
            known[name] = paths[0]
        return found

    def _blocks(self, model: nn.Module, blocks: str | None) -> Sequence[nn.Module]:
        known = self._lists.setdefault(model, {})
        paths, of_lists = known.get(blocks, ([], True))
        there = _at(model, paths)
        if there := _items(there) if of_lists else there:
            return there
        found = list(find_blocks(model, blocks))
        ours = set(found)
        lists = {p: m for p, m in model.named_modules() if isinstance(m, _LISTS) and len(m) and ours.issuperset(m)}
        if _items(lists.values()) == found:  # not equal if a block is in two lists
            known[blocks] = list(lists), True
        elif not lists:
            places = {m: p for p, m in model.named_modules()}
            known[blocks] = [places[block] for block in found], False
        return found


def _at(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules at these paths; an empty list if one of them no longer exists."""
    found = [at_path(model, path) for path in paths]
    there = [module for module in found if module is not None]
    return there if len(there) == len(found) else []


def _items(lists: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules in the lists, in order; an empty list if one of them is no list any more."""
    found: list[nn.Module] = []
    for one in lists:
        if not isinstance(one, _LISTS):
            return []
        found += one
    return found


def _numbered(found: Sequence[nn.Module] | nn.ModuleList, number: int) -> nn.Module:
    if not -len(found) <= number < len(found):
        raise ValueError(f"block {number} does not exist: {len(found)} blocks, 0 to {len(found) - 1}")
    return found[number]
