"""Count the memory that the tensors of a training step take."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Count the bytes of all living tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of its outputs."""
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage once, and subtract it when it is freed."""
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        """Subtract a storage."""
        self.now -= size


def training_memory(step: Callable[[], Any], held: Iterable[Tensor]) -> int:
    """Bytes of tensors alive at the peak of a training step; `held` tensors count from the start.

    Exact for the tensors that PyTorch's operators return. Memory that a kernel allocates internally does not count.
    """
    with LiveTensors() as live:
        for tensor in held:
            live.count(tensor.untyped_storage())
        step()
    return live.peak


def held(optimizer: torch.optim.Optimizer, *models: nn.Module) -> list[Tensor]:
    """The tensors that exist before a step begins: weights and optimizer state."""
    state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    return [*(p for model in models for p in model.parameters()), *state]
