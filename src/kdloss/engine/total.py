"""The gradient of a block of rows, to which every task adds."""

import torch
from torch import Tensor

from kdloss.engine.once import once
from kdloss.reduction import on_cpu
from kdloss.targets.kinds import Classes


class Total:
    """A weighted sum of rows `[r, V]`, in new memory or in a given `place`."""

    def __init__(self, like: Tensor, place: Tensor | None = None) -> None:
        self.like, self.place = like, place
        self.rows: Tensor | None = None
        self.late: tuple[Tensor, Tensor] | None = None

    @property
    def empty_place(self) -> Tensor | None:
        """The given `place` while nothing was added: the rows that are added first may be computed there."""
        return self.place if self.rows is None else None

    def add(self, rows: Tensor, by: Tensor, off: Tensor | None = None, classes: Classes = None) -> None:
        """Add each row times its number. Rows that are `off` are overwritten with zeros first."""
        if off is not None:
            blank(rows, off)
        by = once(by.to(rows.dtype))
        if classes is not None:
            self._some(rows, by, classes)
        elif self.rows is None:
            self.rows = rows * by if self.place is None else torch.mul(rows, by, out=self.place)
        else:
            self.rows.addcmul_(rows, by)

    def at(self, indices: Tensor, by: Tensor, classes: Classes = None) -> None:
        """Add numbers at some of the classes of each row."""
        rows, compiling, alone = self._there(), torch.compiler.is_compiling(), indices.shape[-1] == 1
        if compiling and not alone:  # an empty slot repeats the largest index with a 0: give both the sum
            again = indices == indices.amax(-1, keepdim=True)
            by = torch.where(again, torch.where(again, by, 0).sum(-1, keepdim=True), by)
        if isinstance(classes, Tensor):
            indices = classes[indices]
        if compiling and alone:  # as a sum, so that the gradient is written once
            here = torch.arange(rows.shape[-1], device=rows.device) == indices
            self.rows = rows + torch.where(here, once(by.to(rows.dtype)), 0)
        elif compiling:
            if self.late is not None:
                self.rows = rows.scatter(-1, *self._late(rows))
            self.late = indices, by
        elif rows.shape[-1]:
            rows.scatter_add_(-1, indices, by.to(rows.dtype).expand(indices.shape))

    @property
    def left(self) -> tuple[Tensor, Tensor] | None:
        """What the caller of compiled work writes itself: some classes of each row, and their numbers in the sum.

        The compiler would need a separate sweep over all classes for them.
        """
        return None if self.late is None else self._late(self._there())

    def _late(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.late is not None
        indices, by = self.late
        return indices, rows.gather(-1, indices) + by.to(rows.dtype)

    def _some(self, rows: Tensor, by: Tensor, classes: slice | Tensor) -> None:
        if isinstance(classes, slice):
            self._there()[:, classes].addcmul_(rows, by)
        else:
            self._there().index_add_(-1, classes, rows * by)

    def _there(self) -> Tensor:
        if self.rows is None:
            self.rows = torch.zeros_like(self.like) if self.place is None else self.place.zero_()
        return self.rows

    def blanked(self, nowhere: Tensor | None) -> Tensor:
        """The sum, with zeros in the rows where no task has weight."""
        rows = self._there()
        if nowhere is not None:
            blank(rows, nowhere)
        return rows


def blank(rows: Tensor, off: Tensor) -> None:
    """Write zeros in the rows where `off` `[r, 1]` is True, over NaN, too."""
    if on_cpu(rows.device) and not torch.compiler.is_compiling():  # masks are slow there: write to these rows only
        rows.index_fill_(0, off.squeeze(-1).nonzero().squeeze(-1), 0)
    else:
        rows.masked_fill_(off, 0)
