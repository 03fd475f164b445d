"""Run compiled models eagerly where `torch.compile` would bypass hooks."""

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

_log = logging.getLogger("kdloss")
_said: WeakSet[nn.Module] = WeakSet()
_lock = threading.Lock()
_running = 0
_stance: Any = None


def hooks_seen(modules: Sequence[nn.Module], hooked: Collection[nn.Module]) -> AbstractContextManager[None]:
    """Run everything eagerly inside the `with` if a hooked module is inside a compiled one.

    `modules` are all modules of a model, the model first.

    A graph compiled before the hooks were registered ignores them, and there is no way to ask whether such a graph
    exists. A hook on the compiled module itself works: it runs outside the graph.
    """
    compiled = [m for m in modules if m._compiled_call_impl is not None or "_orig_mod" in m._modules]
    around = next((m for m in compiled if _holds(m, hooked)), None)
    if around is None:
        return nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError(
            f"{type(modules[0]).__name__} was compiled by torch.compile together with modules to be captured, "
            f"whose hooks it may not see before torch 2.6; compile its blocks instead: {BLOCKS}"
        )
    if around not in _said:
        _said.add(around)
        _log.warning(
            "%s was compiled as a whole by torch.compile: it runs eagerly while parts of it are captured. "
            "What stays fast is compiled blocks: %s",
            type(getattr(around, "_orig_mod", around)).__name__,
            BLOCKS,
        )
    return eagerly()


BLOCKS = (
    "for block in kdloss.layers.find_blocks(model): block.compile(), or, in a model without a list of blocks, "
    "model.get_submodule(name).compile() for each module whose features are read"
)


def _holds(module: nn.Module, hooked: Collection[nn.Module]) -> bool:
    return any(part in hooked for part in module.modules() if part is not module)


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside the `with` nothing is compiled or runs compiled, if this torch has `torch.compiler.set_stance`.

    The stance is global to the process: the first thread that enters sets it, and the last that leaves restores it.
    """
    global _running, _stance
    if not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _lock:
        if _running == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                _stance.__exit__(None, None, None)
