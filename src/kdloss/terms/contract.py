"""The settings that all terms of a sum share."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from torch import Tensor

from kdloss._layout import Layout, read
from kdloss.reduction import Reduction, denominator, divided, reduce
from kdloss.terms._positions import Positions


@dataclass(frozen=True)
class Contract:
    """The settings that all terms of a sum share.

    `causal`, `ignore_index`, `reduction`, `check_finite`, `overwrite_logits`, `layout` and `teacher_layout` are the
    arguments of `kdloss.Sum`.
    """

    causal: bool | None = None
    ignore_index: int = -100
    reduction: Reduction = "mean"
    check_finite: bool = False
    overwrite_logits: bool = False
    layout: str | None = None
    teacher_layout: str | EllipsisType | None = ...

    @property
    def layouts(self) -> tuple[Layout | None, Layout | None]:
        """The layouts of the student's and the teacher's logits; None where none was given."""
        taught = self.layout if isinstance(self.teacher_layout, EllipsisType) else self.teacher_layout
        own = None if self.layout is None else read(self.layout)
        return own, None if taught is None else read(taught, "teacher_layout")

    def said(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(Contract, name)}

    def total(self, name: str, values: Tensor, where: Positions, items: int | Tensor | None) -> Tensor:
        """Reduce a term's values to its part of the loss: one number, or one per position for reduction "none".

        `values` is what the term called `name` returned, `where` holds the positions that count, and `items` is
        `num_items_in_batch`.
        """
        if values.shape == where.shifted:
            return reduce(values, where.keep, reduction=self.reduction, num_items_in_batch=items)
        if values.ndim:
            raise ValueError(
                f"the term {name!r} gives values of shape {tuple(values.shape)}; a term gives one number, or one "
                f"for each of the positions {tuple(where.shifted)}"
            )
        if self.reduction == "none":
            raise ValueError(
                f"the term {name!r} is one number for all positions, and reduction='none' needs one for each "
                "position; write reduction='mean' or 'sum'"
            )
        values, counted = _of_something(values, where), where.count()
        if self.reduction == "sum":
            return values * counted
        return values if items is None else divided(values * counted, denominator(1, self.reduction, items))


def mean(values: Tensor, where: Positions) -> Tensor:
    """The value reported for a term: its mean over this call's positions, whatever the loss is divided by."""
    values = values.detach()
    return reduce(values, where.keep) if values.shape == where.shifted else _of_something(values, where)


def _of_something(value: Tensor, where: Positions) -> Tensor:
    """A mean over the positions that count; 0 where none count, since the mean is NaN there."""
    return value if where.keep is None else value.where(where.keep.any(), 0)


def agreed(contracts: Sequence[Contract]) -> Contract:
    """The contract of several added sums: the one that differs from the defaults."""
    found = Contract()
    for contract in contracts:
        if contract.said() and found.said() and contract != found:
            raise ValueError(
                f"two sums say different things of all terms, {found.said()} and {contract.said()}; say it once: "
                "kdloss.Sum(*terms, ...)"
            )
        found = contract if contract.said() else found
    return found
