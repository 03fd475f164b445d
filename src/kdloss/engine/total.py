"""The gradient of a few rows, to which every task adds, and memory for what is computed on the way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Total:
    """A weighted sum of rows `[r, V]`, in one buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.empty = buffer, True

    def add(self, rows: Tensor, by: Tensor, off: Tensor | None = None) -> None:
        """Add rows times a number for each; those that are `off` not, whatever stands there is overwritten."""
        if off is not None:
            blank(rows, off)
        by = by.to(self.buffer.dtype)
        if self.empty:
            torch.mul(rows, by, out=self.buffer)
        else:
            self.buffer.addcmul_(rows, by)
        self.empty = False

    def at(self, classes: Tensor, by: Tensor) -> None:
        """Add a number at one class of each row."""
        if self.buffer.shape[-1]:
            self.buffer.scatter_add_(-1, classes, by.to(self.buffer.dtype))


def blank(rows: Tensor, off: Tensor) -> None:
    """Zeros in the rows where `off` `[r, 1]` is True, in place of NaN, too."""
    if rows.device.type == "cpu":  # where masks are slow: touch those rows alone
        rows.index_fill_(0, off.squeeze(-1).nonzero().squeeze(-1), 0)
    else:
        rows.masked_fill_(off, 0)


class Scratch:
    """Buffers `[r, V]` that are used again: for every few rows, and within them for every task."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (rows, classes), dtype, device
        self.buffers: list[Tensor] = []
        self.taken = 0

    def of(self, rows: int) -> Callable[[], Tensor]:
        """Hands out buffers of that many rows."""

        def new() -> Tensor:
            if self.taken == len(self.buffers):
                self.buffers.append(torch.empty(self.shape, dtype=self.dtype, device=self.device))
            self.taken += 1
            return self.buffers[self.taken - 1][:rows]

        return new

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """What is handed out within is free again behind."""
        before = self.taken
        yield
        self.taken = before
