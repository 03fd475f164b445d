"""How much memory the tensors of a training step take, counted one by one."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of every tensor that operators touch, while it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and take note of its storages."""
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage once, and take it off when it is freed."""
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        """Take off a storage."""
        self.now -= size


def training_memory(step: Callable[[], Any], held: Iterable[Tensor]) -> int:
    """Bytes of tensors alive at the peak of a training step, `held` ones included from the start.

    Exact for tensors that PyTorch's operators return; what a kernel allocates inside is not seen.
    """
    with LiveTensors() as live:
        for tensor in held:
            live.count(tensor.untyped_storage())
        step()
    return live.peak


def held(optimizer: torch.optim.Optimizer, *models: nn.Module) -> list[Tensor]:
    """Weights and optimizer state, which are there before a step begins."""
    state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    return [*(p for model in models for p in model.parameters()), *state]
