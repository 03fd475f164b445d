"""The positions that count for each kind of term."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdloss.terms._positions import Positions
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.task import Task
from kdloss.terms.term import Where


class Wheres:
    """The positions kept by labels and mask, those kept by the mask alone, and of both those with real logits.

    With `causal` and padding on the left, the first real label is compared with the logits of a padding token. A
    model's own loss counts that position, so losses of labels count it too; terms on a teacher or on features don't.
    """

    def __init__(self, labelled: Positions, by_mask: Callable[[], Positions], attention_mask: Tensor | None) -> None:
        self._by_mask, self._padding = by_mask, attention_mask if labelled.causal else None
        self._found: dict[tuple[Where, bool], Positions] = {("labels", False): labelled}

    def of(self, positions: Where, real: bool = True) -> Positions:
        """The positions by "labels" or by "mask", found on demand; `real` leaves out those with logits of padding."""
        key = positions, real and self._padding is not None
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, positions: Where, real: bool) -> Positions:
        if not real:
            return self._by_mask()
        given = self.of(positions, False)
        if positions == "mask" and given is self.of("labels", False):
            return self.of("labels")
        return _real(given, self._padding)

    def of_term(self, term: Any) -> Positions:
        """A term's positions."""
        return self.of(term.positions, not isinstance(term, (CrossEntropy, Task)))

    def widest(self, terms: Iterable[Any]) -> Positions:
        """Positions that include all those that count for any of the terms."""
        every = {id(where): (where, term.positions) for term in terms for where in [self.of_term(term)]}
        if len(every) == 1:
            return next(iter(every.values()))[0]
        return self.of("mask" if any(positions == "mask" for _, positions in every.values()) else "labels", False)


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The positions that both masks keep; None keeps all."""
    return second if first is None else first if second is None else first & second


def _real(where: Positions, attention_mask: Any) -> Positions:
    keep = both(where.keep, attention_mask[:, :-1])
    labels = None if where.labels is None or keep is None else where.labels.masked_fill(torch.logical_not(keep), 0)
    return replace(where, keep=keep, labels=labels)
