"""Count the bytes that a training step reads and writes: eager operators one by one, compiled kernels by the report of
the compiler.
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

WRITTEN_ONLY = {"copy_", "fill_", "zero_"}  # the old content isn't read
PICKED = {"gather", "index_select", "index", "embedding"}  # of the first argument, only the result is read
PUT = {"scatter_", "scatter_add_", "index_put_"}  # of the first argument, only the indexed entries are touched
PUT_ROWS = {"index_fill_", "index_copy_", "index_add_"}


class Moved(TorchDispatchMode):
    """Sum the input and output bytes of every operator that reads or writes a tensor of at least `entries` numbers.

    The work inside a kernel does not count: a softmax is one read and one write. Compiled functions stay compiled under
    this mode, and do not count at all.
    """

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.bytes = entries, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count its bytes."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        read = [t for t in tree_leaves((args, {k: x for k, x in kwargs.items() if k != "out"})) if _is_tensor(t)]
        written = [t for t in tree_leaves(out) if _is_tensor(t)]
        if any(_entries(t) >= self.entries for t in (*read, *written)):
            self.bytes += _moved(name, func._schema.is_mutable, args, read, written)
        return out


def bytes_moved(step: Step, entries: int) -> int:
    """The bytes that a step moves in operators on tensors of at least `entries` numbers; everything is compiled anew.

    The step should have a single block, because the compiler reports what it compiles and not how often it runs.
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
    """Count the bytes that newly compiled kernels read and write; the list holds the number at the end.

    The compiler counts the inputs and outputs of every kernel once, however often the kernel sweeps over them.
    """
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")  # it counts only if this logger is on
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
    """The number of entries in memory; expanded dimensions count once."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return torch.Size(sizes).numel()


def _bytes(t: Tensor) -> int:
    return _entries(t) * t.itemsize
