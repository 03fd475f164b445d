"""Closed forms against a teacher at a temperature of its own."""

from typing import Any

from torch import Tensor

from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.side import LN2, New, Side


def with_teacher_temperature(
    form: ClosedForm, teacher_temperature: float, q: Side, p: Side, new: New, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The form, whose teacher p came at the student's temperature."""
    logits = p.bits * (LN2 * p.temperature)  # less the largest
    return form(q, Side(logits, teacher_temperature, _fresh, p.shard), new, **options)


def _fresh() -> None:
    """No buffer: the result is a new tensor."""
