"""The positions that count for each kind of term."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdloss.terms._positions import Positions
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.task import Task
from kdloss.terms.term import Where


class Wheres:
    """Positions by labels and by the mask alone, and of both those whose logits are no padding's.

    Under `causal` the first label behind padding on the left is held against the padding's logits. A model's own loss
    has that position, so losses of labels have it; nothing is to be learned from a teacher, or of features, there.
    """

    def __init__(self, labelled: Positions, masked: Positions, attention_mask: Tensor | None) -> None:
        self.given: dict[Where, Positions] = {"labels": labelled, "mask": masked}
        self.real = self.given
        if attention_mask is not None and labelled.causal:
            self.real = {"labels": _real(labelled, attention_mask)}
            self.real["mask"] = self.real["labels"] if masked is labelled else _real(masked, attention_mask)

    def of(self, positions: Where) -> Positions:
        """Those whose logits are no padding's."""
        return self.real[positions]

    def of_term(self, term: Any) -> Positions:
        """A term's own."""
        return (self.given if isinstance(term, (CrossEntropy, Task)) else self.real)[term.positions]

    def widest(self, terms: Iterable[Any]) -> Positions:
        """Those which contain all that count for one of the terms."""
        every = {id(where): (where, term.positions) for term in terms for where in [self.of_term(term)]}
        if len(every) == 1:
            return next(iter(every.values()))[0]
        return self.given["mask" if any(positions == "mask" for _, positions in every.values()) else "labels"]


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """What counts by both masks; None counts everything."""
    return second if first is None else first if second is None else first & second


def _real(where: Positions, attention_mask: Tensor) -> Positions:
    keep = both(where.keep, attention_mask[:, :-1])
    labels = None if where.labels is None or keep is None else where.labels.masked_fill(torch.logical_not(keep), 0)
    return replace(where, keep=keep, labels=labels)
