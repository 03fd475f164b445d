"""Gradients by a student's own tensors, gathered from those by rows of its logits."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

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
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    if mixed := mixed_product(total.device.type, a.dtype, total.dtype):
        mixed(total, a, b)
        return
    b = b.to(total.dtype)
    for start in range(0, len(total), rows):
        total[start : start + rows].addmm_(a[start : start + rows].to(total.dtype), b)


@lru_cache
def mixed_product(device: str, dtype: torch.dtype, wide: torch.dtype) -> Callable[..., Any] | None:
    """How PyTorch adds a product of such matrices to a wider one on these devices, if it can: best in place."""
    x, one = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, dtype=wide, device=device)
    for way in (_in_place, _in_two_steps):
        total = one.clone()
        try:
            way(total, x, x)
        except (TypeError, RuntimeError):  # an older PyTorch, or no such operator
            continue
        if torch.equal(total, 17 * one):
            return way
    return None


def _in_place(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _in_two_steps(total: Tensor, a: Tensor, b: Tensor) -> None:
    total += torch.mm(a, b, out_dtype=total.dtype)


class OfHead:
    """A student that gave hidden states and head: the logits' gradient takes the place of their block."""

    def __init__(self, student: LazyLogits, rows: Rows, shard: Shard | None) -> None:
        self.shard, self.in_place = shard, True
        self.student, self.rows_of, self.lazy = student, rows, rows.lazy
        self.hidden = torch.empty_like(rows.lazy.hidden, dtype=student.hidden.dtype)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

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
        x, gradient, hidden = self.student, self.rows_of(start, stop), self.lazy.hidden[start:stop]
        if x.hidden.requires_grad:
            self.hidden[start:stop] = gradient @ self.lazy.weight
        if x.bias is not None and x.bias.requires_grad:
            of_block = gradient.sum(0, dtype=_wide(x.bias.dtype))
            self.bias = of_block if self.bias is None else self.bias.add_(of_block)
        if x.weight.requires_grad:
            alone = len(hidden) == len(self.lazy.hidden)  # then it is rounded once as it is, and else where it ends
            dtype = x.weight.dtype if alone else _wide(x.weight.dtype)
            if self.weight is None and dtype == gradient.dtype:
                self.weight = gradient.T @ hidden
                return
            if self.weight is None:
                self.weight = torch.zeros(x.weight.shape, dtype=_wide(dtype), device=x.device)
            add_product(self.weight, gradient.T, hidden)

    def tensors(self) -> Sequence[Tensor | None]:
        """One gradient for each of the student's tensors."""
        self.rows_of.made = None  # all blocks were read
        x, hidden, index = self.student, self.hidden, self.rows_of.index
        if x.hidden.requires_grad and self.shard is not None:
            hidden = self.shard.sum(hidden)
        if x.hidden.requires_grad and index is not None:
            whole = hidden.new_zeros(x.hidden.shape[:-1].numel(), x.hidden.shape[-1])
            hidden = whole.index_copy_(0, index, hidden)
        found = hidden.view(x.hidden.shape) if x.hidden.requires_grad else None, _total(self.weight, x.weight)
        return found if x.bias is None else (*found, _total(self.bias, x.bias))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums over blocks need more digits than 16 bits have."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _total(total: Tensor | None, of: Tensor) -> Tensor | None:
    """A sum over blocks in its tensor's dtype, if that is trained; 0 where there was no block."""
    if not of.requires_grad:
        return None
    return torch.zeros_like(of) if total is None else total.to(of.dtype)


Gradients = OfLogits | OfHead
