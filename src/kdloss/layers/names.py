"""Look up modules by name, also inside DDP, torch.compile, FSDP and peft wrappers."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import nn

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PART = re.compile(r"(.*?)((?:\[[^\[\]]+\])*)", re.DOTALL)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP, torch.compile or peft."""
    while True:
        base: Any = attribute(model, "get_base_model")
        if callable(base):
            inner: Any = base()
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif len(model._modules) == 1 and "module" in model._modules and not model._parameters:
            inner = model._modules["module"]
        else:
            return model
        model = inner


def attribute(model: nn.Module, name: str) -> Any:
    """`getattr(model, name, None)` for non-modules, faster: `nn.Module` is slow to report a missing attribute."""
    kind = type(model)
    if name in vars(model) or hasattr(kind, name) or kind.__getattr__ is not nn.Module.__getattr__:
        return getattr(model, name, None)
    return None


def at_path(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path from `named_modules`; None if there is none any more."""
    found = model
    for name in filter(None, path.split(".")):
        children = found._modules  # TorchScript's `_modules` have no `get`
        inner = children[name] if name in children else None  # noqa: SIM401
        if inner is None:
            return None
        found = inner
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, level by level: faster than `model.modules()`, since every step needs them."""
    found, seen = [model], {model}
    for module in found:
        if inside := module._modules:
            for inner in inside.values():
                if inner is not None and inner not in seen:
                    seen.add(inner)
                    found.append(inner)
    return found


def unwrapped_block(module: nn.Module) -> nn.Module:
    """The block inside wrappers of single blocks: compilation, checkpointing, FSDP."""
    while len(module._modules) == 1 and (name := next(iter(module._modules.keys()))) in _WRAPPERS:
        inner = module._modules[name]
        if inner is None:
            break
        module = inner
    return module


@lru_cache(maxsize=1024)
def split_name(name: str) -> tuple[str, tuple[int | str, ...]]:
    """Split a name into the module's name and the path into its output, given in brackets.

    >>> split_name("fpn"), split_name("fpn[0]"), split_name("net.backbone[out][-1]")
    (('fpn', ()), ('fpn', (0,)), ('net.backbone', ('out', -1)))
    """
    match = _PART.fullmatch(name)
    module, brackets = match.groups() if match else (name, "")
    keys = (key.strip("'\"") for key in re.findall(r"\[([^\[\]]+)\]", brackets))
    return module, tuple(int(key) if re.fullmatch(r"-?\d+", key) else key for key in keys)


def resolve(model: nn.Module, name: str) -> nn.Module:
    """The module of this name. Wrapper prefixes may be left out, and a path into its output is ignored.

    Raises: ValueError, with the nearest names, if there is none.
    """
    name, _ = split_name(name)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in modules and name:
        return modules[name]
    inner = {_plain(n): m for n, m in modules.items()}
    inner |= {_plain(n): m for n, m in unwrap(model).named_modules(remove_duplicate=False)}
    if (plain := _plain(name)) in inner and plain:
        return inner[plain]
    raise ValueError(f"{type(model).__name__} has no module {name!r}; {_nearest(name, inner)}")


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _nearest(name: str, names: Iterable[str]) -> str:
    known = [n for n in names if n]
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"the nearest are {near}" if near else f"it has {known[:10]}"
