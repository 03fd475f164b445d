"""Rows of several teachers, each computed once."""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.block_sizes import equal_blocks
from kdloss.engine.rows import Rows, identity
from kdloss.targets import LazyLogits, Mixture
from kdloss.targets.kinds import AnyLogits, Classes, chosen_classes, is_double


class Read(NamedTuple):
    """Logits or soft labels at all positions, and the temperature and classes at which a task reads them."""

    x: AnyLogits
    temperature: float = 1.0
    classes: Classes = None


class Teachers:
    """Several teachers' rows; a teacher that several tasks or mixtures read is computed once.

    Each lazy teacher has its own buffer, which is used again for every block. Lazy teachers that are read only for
    averages share one buffer, if that takes less memory: they are computed one after the other and added up.
    """

    def __init__(self, reads: Iterable[Read], index: Tensor | None) -> None:
        self.index = index
        self.rows: dict[Hashable, Rows] = {}
        self.of: dict[Hashable, Callable[[int, int], Any]] = {}
        self.averages: list[Average] = []
        self.buffer: Tensor | None = None
        self.chosen = False
        mixtures: dict[Hashable, dict[Hashable, list[Read]]] = {}
        for read in reads:
            x = read.x
            self.chosen = self.chosen or read.classes is not None or isinstance(x, Mixture)
            if isinstance(x, Mixture) and len(x.teachers) > 1:
                how = read.temperature if x.of_probabilities else None, identity(read.classes)
                mixtures.setdefault(identity(x), {}).setdefault(how, []).append(read)
            else:
                rows = self._rows(x.teachers[0] if isinstance(x, Mixture) else x)
                self.of[_key(*read)] = partial(_rows_of, rows, read.classes)
        self.own = list(self.rows.values())
        for ways in mixtures.values():
            self._mix(list(ways.values()))

    def _rows(self, x: AnyLogits) -> Rows:
        key = identity(x)
        if key not in self.rows:
            self.rows[key] = Rows(x, self.index)
        return self.rows[key]

    def _mix(self, ways: list[list[Read]]) -> None:
        """Add a mixture, with the ways in which tasks read it.

        Its average is computed for each block in advance where the teachers share one buffer, else when it is read.
        """
        mixture: Any = ways[0][0].x
        members = [(weight, self._rows(x)) for weight, x in mixture.weighted()]
        others = {id(rows): rows for _, rows in members if rows not in self.own}
        passing = sum(isinstance(rows.x, LazyLogits) for rows in others.values()) > len(ways) + 1
        if not passing:
            self.own += others.values()
        for reads in ways:
            _, temperature, classes = reads[0]
            average = Average(mixture, members, temperature, classes)
            self.averages += [average] * passing
            for read in reads:
                self.of[_key(*read)] = average.made if passing else average.computed

    @property
    def in_memory(self) -> bool:
        """Whether all rows lie in memory in order, so that they are read without a copy."""
        return not self.chosen and all(rows.in_memory for rows in self.rows.values())

    @property
    def row_bytes(self) -> tuple[int, int]:
        """The bytes of one computed row: of the largest teacher, and of all that is kept at a time."""
        own = [rows.row_bytes for rows in self.own]
        passing = [rows.row_bytes for rows in self.rows.values() if rows not in self.own]
        averages = [average.row_bytes for average in self.averages]
        return max(own + passing, default=0), sum(own) + max(passing, default=0) + sum(averages)

    def make(self, start: int, stop: int, per_block: int) -> None:
        """Compute rows start to stop of lazy teachers, and of averages `per_block` rows at a time."""
        for rows in self.rows.values():
            rows.make(start, stop, None if rows in self.own else self.buffer)
            for average in self.averages:
                average.add(rows, start, stop, per_block)
            if rows not in self.own:
                self.buffer, rows.made = rows.made, None

    def __call__(self, x: AnyLogits, start: int, stop: int, temperature: float, classes: Classes = None) -> Any:
        """Rows start to stop of one teacher, for a loss at this temperature over these classes."""
        return self.of[_key(x, temperature, classes)](start, stop)


class Average:
    """Rows of a mixture at a temperature, over some classes."""

    def __init__(self, of: Mixture, members: list[tuple[float, Rows]], temperature: float, classes: Classes) -> None:
        self.of, self.members, self.temperature, self.classes = of, members, temperature, classes
        self.total: Tensor | None = None
        self.first = self.there = 0

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.of.shape[-1] * (8 if is_double(self.of) else 4)

    def computed(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, computed now from the teachers' rows."""
        rows = ((weight, _rows_of(rows, self.classes, start, stop)) for weight, rows in self.members)
        return self.of.of_rows(rows, self.temperature)

    def made(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the block that `add` computed."""
        assert self.total is not None
        return self.total[start - self.first : stop - self.first]

    def add(self, rows: Rows, start: int, stop: int, per_block: int) -> None:
        """Add a block of one teacher's rows, if the teacher is a member of this mixture."""
        for weight, mine in self.members:
            if mine is rows:
                self.first, self.there = start, self.there % len(self.members) + 1
                for i, j in equal_blocks(stop - start, per_block, start):
                    self._add(weight, _rows_of(rows, self.classes, i, j), i - start, stop - start)

    def _add(self, weight: float, z: Tensor, at: int, rows: int) -> None:
        if self.total is None or len(self.total) < rows:
            dtype = torch.float64 if is_double(self.of) else torch.float32
            self.total = z.new_empty(rows, z.shape[-1], dtype=dtype)
        total = self.total[at : at + len(z)]
        self.of.added(None if self.there == 1 else total, weight, z, self.temperature, out=total)
        if self.there == len(self.members) and self.of.average == "probabilities":
            total.mul_(self.temperature)


def _key(x: AnyLogits, temperature: float, classes: Classes) -> Hashable:
    return id(x), temperature, id(classes)


def _rows_of(rows: Rows, classes: Classes, start: int, stop: int) -> Any:
    return chosen_classes(rows(start, stop), classes)
