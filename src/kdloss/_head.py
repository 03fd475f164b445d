"""Where a model's head is, and whether its full logits have to be made."""

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from kdloss.layers.names import attribute, unwrap

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


class Paths:
    """Remembers the path from each model to its head; a path that leads elsewhere now is searched again."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def to_head(self, model: nn.Module) -> list[nn.Module]:
        """The modules from the model to its head, with both; only both where the head is hidden; [] without one."""
        known = self._known.get(model)
        if known is not None and type((found := _along(model, known))[-1]) is nn.Linear:
            return found
        head = _head(model)
        if head is None:
            return []
        path = next((name for name, module in model.named_modules() if module is head), None)
        if path is None:
            return [model, head]
        if not _is_chosen(path):
            self._known[model] = path
        return _along(model, path)


def why_full(path: list[nn.Module]) -> str | None:
    """The reason why full logits have to be made, as far as the `path` to the head shows it; None if none."""
    if not path:
        return "it has no output embeddings"
    head = path[-1]
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, no plain nn.Linear"
    if type(head.weight) is not nn.Parameter or hasattr(head.weight, "ds_id") or head.weight.is_meta:
        return f"its head's weight is sharded, quantised or elsewhere ({type(head.weight).__name__})"
    hooks = head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks
    if any(hooks) or "forward" in vars(head):
        return "its head has hooks of somebody else's"
    for module in path:
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return "it was compiled as a whole; compile its blocks instead"
        if _is_sharded(type(module)):  # type: ignore[arg-type]
            return "FSDP shards its head"
        if attribute(module, "static_graph") is True:
            return "DDP with static_graph=True synchronises only what its output leads to"
    return None


@lru_cache(maxsize=256)
def _is_sharded(kind: type) -> bool:
    return not _SHARDED.isdisjoint(c.__name__ for c in kind.__mro__)


def _head(model: nn.Module) -> nn.Module | None:
    """A model's head; if peft trains a copy of it (`modules_to_save`), that copy."""
    inner = unwrap(model)
    find = attribute(inner, "get_output_embeddings")
    if not callable(find):
        return None
    head: Any = find()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        head = next((copies[name] for name in head.active_adapters if name in copies), head)
    return head if isinstance(head, nn.Module) else None


def _is_chosen(path: str) -> bool:
    """Whether peft chooses among modules at this path, by which adapter is active."""
    return "modules_to_save" in path.split(".")


def _along(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules along a path, as far as the path exists."""
    found = [model]
    for name in filter(None, path.split(".")):
        children = found[-1]._modules
        inner = children[name] if name in children else None  # noqa: SIM401 - TorchScript's `_modules` have no `get`
        if inner is None:
            break
        found.append(inner)
    return found
