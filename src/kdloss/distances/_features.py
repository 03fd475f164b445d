"""Both sides of a distance between features."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import alike


def features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Checked features of student and detached teacher, in float32 or better."""
    _checks.pair("features", student, teacher)
    student, teacher = alike(student, teacher.detach())
    return student, teacher


def unit(x: Tensor) -> Tensor:
    """Vectors `[..., D]` of length 1; a zero vector stays one, and gets no gradient of any order."""
    return x * _where_not_zero(x.square().sum(-1, keepdim=True), Tensor.rsqrt)


def root(squares: Tensor) -> Tensor:
    """Square roots; 0 gets no gradient of any order."""
    return _where_not_zero(squares, Tensor.sqrt)


def _where_not_zero(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    zero = x == 0
    return function(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def squared_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences: one sweep and one tensor each way, where `(s - t).square()` has two and three."""
    return as_they_lie(F.mse_loss, student, teacher)


def as_they_lie(gap: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """A loss of PyTorch, entry by entry, of maps with their channels last: its gradient would be stored anew."""
    if student.is_contiguous() or not student.mT.is_contiguous():
        return gap(student, teacher, reduction="none")
    return gap(student.mT, teacher.mT, reduction="none").mT


def mean(x: Tensor) -> Tensor:
    """Over the width: a sum first, whose gradient is a view where the mean's is a tensor."""
    return x.sum(-1) / max(x.shape[-1], 1)
