"""Collect the gradients by a student's tensors from the gradients by rows of its logits."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.overwritten import mark
from kdloss.engine.rows import Rows, flat_view
from kdloss.targets import LazyLogits
from kdloss.targets.sharded import Shard


class OfLogits:
    """Gradients of a student given by its logits: one tensor of their size, or written over the logits."""

    def __init__(self, logits: Tensor, rows: Rows, overwrite: bool) -> None:
        self.index = rows.index
        in_place = overwrite and flat_view(logits, rows.positions) is not None and _own_memory(logits)
        empty = torch.empty if self.index is None else torch.zeros
        self.gradient = logits.detach() if in_place else empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.flat = self.gradient.view(logits.shape[:-1].numel(), logits.shape[-1])
        self.in_place = in_place

    def place(self, start: int, stop: int) -> Tensor | None:
        """The memory for the gradient of these rows, None where it isn't contiguous; `in_place` it is the logits'."""
        return None if self.index is not None else self.flat[start:stop]

    def rows(self, start: int, stop: int, gradient: Tensor) -> None:
        """Store the gradient of these rows."""
        if self.index is None:
            self.flat[start:stop].copy_(gradient)
        else:
            self.flat.index_copy_(0, self.index[start:stop], gradient.to(self.flat.dtype))

    def block(self, start: int, stop: int) -> None:
        """End a block: nothing to do here."""

    def tensors(self) -> Sequence[Tensor | None]:
        """One gradient for each of the student's tensors."""
        if self.in_place and self.index is not None:
            ignored = torch.ones(len(self.flat), dtype=torch.bool, device=self.flat.device)
            ignored[self.index] = False
            self.flat.masked_fill_(ignored.unsqueeze(-1), 0)
        if self.in_place:
            mark(self.gradient)
        return (self.gradient,)


def _own_memory(t: Tensor) -> bool:
    """Whether every entry has its own memory, which those of expanded tensors don't."""
    return all(stride or size <= 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def add_product(total: Tensor, a: Tensor, b: Tensor, rows: int = 4096) -> None:
    """Total += a @ b, without rounding the product to the dtype of a and b first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    if add := wide_product(total.device.type, a.dtype, total.dtype):
        add(total, a, b)
        return
    b = b.to(total.dtype)
    for start in range(0, len(total), rows):
        total[start : start + rows].addmm_(a[start : start + rows].to(total.dtype), b)


@lru_cache
def wide_product(device: str, dtype: torch.dtype, wide: torch.dtype) -> Callable[..., Any] | None:
    """A function that adds a product of `dtype` matrices to a `wide` one on this device, in place if PyTorch can.

    None where PyTorch has no such operator.
    """
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
    """Gradients of a student given by hidden states and head: each block's logits are overwritten by their gradient."""

    def __init__(self, student: LazyLogits, rows: Rows, shard: Shard | None) -> None:
        self.shard, self.in_place = shard, True
        self.student, self.rows_of, self.lazy = student, rows, rows.lazy
        self.hidden = torch.empty_like(rows.lazy.hidden, dtype=student.hidden.dtype)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def place(self, start: int, stop: int) -> Tensor | None:
        """The memory of the block's logits; None where they were scaled or capped after the head."""
        shaped = self.lazy.softcap is not None or self.lazy.scale != 1
        return None if shaped else self.rows_of(start, stop)

    def rows(self, start: int, stop: int, gradient: Tensor) -> None:
        """Store the gradient of these rows, taken back through soft-cap and scale."""
        z = self.rows_of(start, stop)
        if self.lazy.softcap is not None:
            gradient.mul_(1 - (z / self.lazy.softcap).square())
        if self.lazy.scale != 1:
            gradient.mul_(self.lazy.scale)
        z.copy_(gradient)

    def block(self, start: int, stop: int) -> None:
        """End a block: take its gradient back through the head, to hidden states, weight and bias."""
        x, gradient, hidden = self.student, self.rows_of(start, stop), self.lazy.hidden[start:stop]
        if x.hidden.requires_grad:
            self.hidden[start:stop] = gradient @ self.lazy.weight
        if x.bias is not None and x.bias.requires_grad:
            of_block = gradient.sum(0, dtype=_wide(x.bias.dtype))
            self.bias = of_block if self.bias is None else self.bias.add_(of_block)
        if x.weight.requires_grad:
            alone = len(hidden) == len(self.lazy.hidden)  # one block is rounded once; a sum of blocks is kept wide
            dtype = x.weight.dtype if alone else _wide(x.weight.dtype)
            if self.weight is None and dtype == gradient.dtype:
                self.weight = gradient.T @ hidden
                return
            if self.weight is None:
                self.weight = torch.zeros(x.weight.shape, dtype=_wide(dtype), device=x.device)
            add_product(self.weight, gradient.T, hidden)

    def tensors(self) -> Sequence[Tensor | None]:
        """One gradient for each of the student's tensors."""
        self.rows_of.made = None  # frees the last block
        x, hidden, index = self.student, self.hidden, self.rows_of.index
        if x.hidden.requires_grad and self.shard is not None:
            hidden = self.shard.sum(hidden)
        if x.hidden.requires_grad and index is not None:
            everywhere = hidden.new_zeros(x.hidden.shape[:-1].numel(), x.hidden.shape[-1])
            hidden = everywhere.index_copy_(0, index, hidden)
        found = hidden.view(x.hidden.shape) if x.hidden.requires_grad else None, _total(self.weight, x.weight)
        return found if x.bias is None else (*found, _total(self.bias, x.bias))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over blocks: 16 bits have too few digits."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _total(total: Tensor | None, of: Tensor) -> Tensor | None:
    """A sum over blocks in the dtype of its tensor; 0 where there was no block, None where it isn't trained."""
    if not of.requires_grad:
        return None
    return torch.zeros_like(of) if total is None else total.to(of.dtype)


Gradients = OfLogits | OfHead
