"""The rows of any kind of logits at the positions that count, a block at a time."""

from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from kdloss.targets import LazyLogits
from kdloss.targets.kinds import AnyLogits, at


class Rows:
    """Rows `[r, V]` of logits, numbered by their place in `index` (None: all positions, flattened).

    `make` computes a block of lazy logits into a buffer that is used again; a call then returns rows of this block.
    """

    def __init__(self, x: AnyLogits, index: Tensor | None) -> None:
        self.x, self.index = x, index
        self.positions = len(x.shape) - 1
        self.made: Tensor | None = None
        self.first = 0
        self.flat = flat_view(x, self.positions) if isinstance(x, Tensor) else None
        if isinstance(x, LazyLogits):
            self.lazy = in_matmul_dtype(x.with_hidden(self._take(x.hidden, 0, None)))

    def zero_spoilt(self, nowhere: Tensor | None) -> Tensor | None:
        """Zero rows with NaN or infinity that don't count: the head's gradient would multiply them by 0.

        `nowhere` says which rows don't count, `[rows, 1]` or `[1, 1]`. Returns the rows that were zeroed, `[rows]`,
        whose values mean nothing then; None if there is nothing to zero.
        """
        if nowhere is None or not isinstance(self.x, LazyLogits):
            return None
        hidden = self.lazy.hidden
        spoilt = nowhere & ~hidden.isfinite().all(-1, keepdim=True)
        self.lazy = self.lazy.with_hidden(hidden.masked_fill(spoilt, 0))
        return spoilt.squeeze(-1)

    def make(self, start: int, stop: int, buffer: Tensor | None = None) -> None:
        """Compute rows start to stop of lazy logits, in the given buffer if it is large enough."""
        if isinstance(self.x, LazyLogits):
            self.made = head(self.lazy, start, stop, self.made if buffer is None else buffer)
        self.first = start

    def __call__(self, start: int, stop: int) -> Any:
        """Rows start to stop; of lazy logits from the block that `make` computed."""
        if self.made is not None:
            return sliced(self.made, start - self.first, stop - self.first)
        if self.flat is not None:
            return self.flat[start:stop] if self.index is None else self.flat[self.index[start:stop]]
        if self.index is None and (start, stop) == (0, *self.x.shape[:-1]):
            return self.x
        return at(self.x, lambda t: self._take(t, start, stop))

    @property
    def in_memory(self) -> bool:
        """Whether all rows lie in memory in order, so that they are read without a copy."""
        return self.flat is not None and self.index is None

    @property
    def row_bytes(self) -> int:
        """The bytes of one row that `make` computes; 0 where there is nothing to compute."""
        return self.lazy.shape[-1] * self.lazy.hidden.dtype.itemsize if isinstance(self.x, LazyLogits) else 0

    def _take(self, t: Tensor, start: int, stop: int | None) -> Tensor:
        flat, shape = flat_view(t, self.positions), t.shape[: self.positions]
        if flat is not None:
            return sliced(flat, start, stop) if self.index is None else flat[sliced(self.index, start, stop)]
        index = torch.arange(shape.numel(), device=t.device) if self.index is None else self.index
        return t[torch.unravel_index(index[start:stop], shape)]


def identity(x: Any) -> Hashable:
    """A key that is equal for logits whose tensors share the same memory."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.data_ptr(), x.dtype, x.shape, x.stride()
    if isinstance(x, slice):  # which older Python can't hash
        return x.start, x.stop, x.step
    if isinstance(x, (list, tuple)):
        return tuple(map(identity, x))
    return (type(x), *map(identity, vars(x).values())) if is_dataclass(x) else x


def sliced(t: Tensor, start: int, stop: int | None) -> Tensor:
    """Rows start to stop; the tensor itself where these are all, which takes a tenth of the time."""
    return t if start == 0 and (stop is None or stop == t.shape[0]) else t[start:stop]


def flat_view(t: Tensor, positions: int) -> Tensor | None:
    """A view of a tensor with its positions in one dimension; None where that needs a copy."""
    if positions == 0:
        return t.unsqueeze(0)
    try:
        return t.view(t.shape[:positions].numel(), *t.shape[positions:])
    except RuntimeError:
        return None


def matmul_dtype(lazy: LazyLogits) -> torch.dtype:
    """The dtype of the product with the head: autocast's, or else the model's."""
    kind, dtype = lazy.device.type, lazy.hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


def in_matmul_dtype(lazy: LazyLogits) -> LazyLogits:
    """Hidden states and head in the dtype of their product."""
    dtype = matmul_dtype(lazy)
    if all(x is None or x.dtype == dtype for x in (lazy.hidden, lazy.weight, lazy.bias)):
        return lazy
    bias = None if lazy.bias is None else lazy.bias.to(dtype)
    return LazyLogits(lazy.hidden.to(dtype), lazy.weight.to(dtype), bias, lazy.softcap, lazy.scale)


def head(lazy: LazyLogits, start: int, stop: int, buffer: Tensor | None) -> Tensor:
    """The logits of some rows, scaled and capped in place; in the buffer if it is large enough."""
    rows, classes, dtype = stop - start, lazy.weight.shape[0], lazy.hidden.dtype
    if buffer is None or buffer.shape[0] < rows or (buffer.shape[-1], buffer.dtype) != (classes, dtype):
        buffer = lazy.hidden.new_empty(rows, classes)
    hidden, weight, z = sliced(lazy.hidden, start, stop), lazy.weight.T, sliced(buffer, 0, rows)
    if lazy.bias is None:
        torch.mm(hidden, weight, out=z)
    else:  # one rounding, as in nn.Linear
        torch.addmm(lazy.bias, hidden, weight, out=z)
    if lazy.scale != 1:
        z.mul_(lazy.scale)
    if lazy.softcap is not None:
        z.div_(lazy.softcap).tanh_().mul_(lazy.softcap)
    return buffer
