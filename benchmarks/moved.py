"""How many bytes of memory a training step reads and writes, counted: operators one by one, compiled kernels by the
compiler's own report.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import Step
from torch import Tensor
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITTEN_ONLY = {"copy_", "fill_", "zero_"}  # what stood there isn't read
PICKED = {"gather", "index_select", "index", "embedding"}  # of the first, only what comes out is read
PUT = {"scatter_", "scatter_add_", "index_put_"}  # of the first, only what the others say is touched
PUT_ROWS = {"index_fill_", "index_copy_", "index_add_"}


class Moved(TorchDispatchMode):
    """Adds up inputs and outputs of every operator that reads or writes a tensor of at least `entries` numbers.

    What a kernel does inside is not seen: a softmax counts as one reading and one writing. Compiled functions run
    compiled within it, and are not seen at all.
    """

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.bytes = entries, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        read = [t for t in tree_leaves((args, {k: x for k, x in kwargs.items() if k != "out"})) if _is_tensor(t)]
        written = [t for t in tree_leaves(out) if _is_tensor(t)]
        if any(_entries(t) >= self.entries for t in (*read, *written)):
            self.bytes += _moved(name, func._schema.is_mutable, args, read, written)
        return out


def bytes_moved(step: Step, entries: int) -> int:
    """Bytes that a step moves, with operators on tensors of at least so many numbers; compiles anew what it compiles.

    To be read per block, the step is to have one: the compiler reports what it compiles, not how often that runs.
    """
    with (
        compilers_report() as compiled,
        torch._dynamo.config.patch(inline_torch_dispatch_torch_compile=False),
        Moved(entries) as eager,
    ):
        step()
    return eager.bytes + compiled[0]


@contextmanager
def compilers_report() -> Iterator[list[int]]:
    """Within, what is newly compiled for CPU or GPU: one number in the end, the bytes that its kernels read and write.

    The compiler counts every kernel's inputs and outputs once, however often the kernel sweeps over them.
    """
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")  # it counts for who listens
    level, log.propagate, found = log.level, False, []
    log.setLevel(logging.INFO)
    without_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    torch._dynamo.reset()
    metrics.reset()
    try:
        with torch._inductor.config.patch(fx_graph_cache=False), without_cache:
            yield found
        found.append(metrics.num_bytes_accessed)
    finally:
        log.setLevel(level)


def _moved(name: str, mutable: bool, args: Any, read: list[Tensor], written: list[Tensor]) -> int:
    if "empty" in name or (not mutable and read and all(_shared(t, read) for t in written)):  # views
        return 0
    if name in PICKED:
        return sum(map(_bytes, read[1:])) + 2 * sum(map(_bytes, written))
    if name in PUT:
        return sum(map(_bytes, read[1:])) + 2 * max(map(_entries, read[1:])) * read[0].itemsize
    if name in PUT_ROWS:
        rows = args[2].numel() / max(read[0].shape[args[1]], 1)
        return sum(map(_bytes, read[1:])) + int(rows * _bytes(read[0]))
    return sum(map(_bytes, read[1:] if name in WRITTEN_ONLY else read)) + sum(map(_bytes, written))


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _shared(t: Tensor, others: list[Tensor]) -> bool:
    return any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in others)


def _entries(t: Tensor) -> int:
    """How many numbers stand in memory: one that is expanded counts once."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return torch.Size(sizes).numel()


def _bytes(t: Tensor) -> int:
    return _entries(t) * t.itemsize
