"""Gradients by a student's own tensors, gathered from those by rows of its logits."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kdloss.engine.rows import Rows, flat_view
from kdloss.targets import LazyLogits
from kdloss.targets.sharded import Shard


class OfLogits:
    """A student that gave its logits: the gradient is as large as they are, or takes their place."""

    def __init__(self, logits: Tensor, rows: Rows, overwrite: bool) -> None:
        self.index = rows.index
        in_place = overwrite and flat_view(logits, rows.positions) is not None and _own_memory(logits)
        empty = torch.empty if self.index is None else torch.zeros
        self.gradient = logits.detach() if in_place else empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.flat = self.gradient.view(logits.shape[:-1].numel(), logits.shape[-1])
        self.in_place = in_place

    def place(self, start: int, stop: int) -> Tensor | None:
        """Where the gradient of some rows belongs, if it is one place: for a student that is `in_place` its logits'."""
        return None if self.index is not None else self.flat[start:stop]

    def rows(self, start: int, stop: int, gradient: Tensor) -> None:
        """Take the gradient of some rows."""
        if self.index is None:
            self.flat[start:stop].copy_(gradient)
        else:
            self.flat.index_copy_(0, self.index[start:stop], gradient.to(self.flat.dtype))

    def block(self, start: int, stop: int) -> None:
        """Nothing is left to do for a block."""

    def tensors(self) -> Sequence[Tensor | None]:
        """One gradient for each of the student's tensors."""
        if self.in_place and self.index is not None:
            ignored = torch.ones(len(self.flat), dtype=torch.bool, device=self.flat.device)
            ignored[self.index] = False
            self.flat.masked_fill_(ignored.unsqueeze(-1), 0)
        return (self.gradient,)


def _own_memory(t: Tensor) -> bool:
    """Whether no two entries are the same number in memory, as in expanded tensors."""
    return all(stride or size <= 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def add_product(total: Tensor, a: Tensor, b: Tensor, rows: int = 4096) -> None:
    """Total += a @ b, the product not rounded to the dtype of a and b on the way."""
    if mixed_products(total.device.type):
        total += torch.mm(a, b, out_dtype=total.dtype)
        return
    b = b.to(total.dtype)
    for start in range(0, len(total), rows):
        total[start : start + rows].addmm_(a[start : start + rows].to(total.dtype), b)


@lru_cache
def mixed_products(device: str) -> bool:
    """Whether PyTorch multiplies 16-bit matrices into float32 on these devices."""
    x = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # an older PyTorch, or no such operator
        return False
    return True


class OfHead:
    """A student that gave hidden states and head: the logits' gradient takes the place of their block."""

    def __init__(self, student: LazyLogits, rows: Rows, shard: Shard | None) -> None:
        self.shard, self.in_place = shard, True
        self.student, self.rows_of, self.lazy = student, rows, rows.lazy
        n = len(self.lazy.hidden)
        self.hidden = self._zeros(student.hidden, (n, student.hidden.shape[-1]))
        self.weight = self._zeros(student.weight, student.weight.shape, wide=True)
        self.bias = None if student.bias is None else self._zeros(student.bias, student.bias.shape, wide=True)

    def place(self, start: int, stop: int) -> Tensor | None:
        """The logits' own, where these are what the head gave."""
        shaped = self.lazy.softcap is not None or self.lazy.scale != 1
        return None if shaped else self.rows_of(start, stop)

    def rows(self, start: int, stop: int, gradient: Tensor) -> None:
        """Take the gradient of some rows, back through cap and scale."""
        z = self.rows_of(start, stop)
        if self.lazy.softcap is not None:
            gradient.mul_(1 - (z / self.lazy.softcap).square())
        if self.lazy.scale != 1:
            gradient.mul_(self.lazy.scale)
        z.copy_(gradient)

    def block(self, start: int, stop: int) -> None:
        """The head's products of a whole block."""
        gradient, hidden = self.rows_of(start, stop), self.lazy.hidden[start:stop]
        if self.hidden is not None:
            self.hidden[start:stop] = gradient @ self.lazy.weight
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if self.weight is not None and self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.T, hidden)
        elif self.weight is not None:
            add_product(self.weight, gradient.T, hidden)

    def tensors(self) -> Sequence[Tensor | None]:
        """One gradient for each of the student's tensors."""
        x, hidden, index = self.student, self.hidden, self.rows_of.index
        if hidden is not None and self.shard is not None:
            hidden = self.shard.sum(hidden)
        if hidden is not None and index is not None:
            whole = hidden.new_zeros(x.hidden.shape[:-1].numel(), x.hidden.shape[-1])
            hidden = whole.index_copy_(0, index, hidden)
        hidden = None if hidden is None else hidden.view(x.hidden.shape)
        weight = None if self.weight is None else self.weight.to(x.weight.dtype)
        if x.bias is None:
            return hidden, weight
        return hidden, weight, None if self.bias is None else self.bias.to(x.bias.dtype)

    def _zeros(self, like: Tensor, shape: Sequence[int], wide: bool = False) -> Tensor | None:
        if not like.requires_grad:
            return None
        narrow = wide and like.dtype.itemsize < 4  # sums over blocks need more digits
        return torch.zeros(shape, dtype=torch.float32 if narrow else like.dtype, device=like.device)


Gradients = OfLogits | OfHead
