"""Helpers that distances between features share."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import alike


def features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check both sides, detach the teacher and convert both to float32 or better."""
    _checks.pair("features", student, teacher)
    student, teacher = alike(student, teacher.detach())
    return student, teacher


def unit(x: Tensor) -> Tensor:
    """Scale vectors `[..., D]` to length 1. A zero vector stays zero and gets no gradient of any order."""
    return x * _where_not_zero(x.square().sum(-1, keepdim=True), Tensor.rsqrt)


def root(squares: Tensor) -> Tensor:
    """Square root. A 0 stays 0 and gets no gradient of any order."""
    return _where_not_zero(squares, Tensor.sqrt)


def _where_not_zero(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    zero = x == 0
    return function(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def squared_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared differences: one pass forward and one backward, where `(s - t).square()` takes two and three."""
    return elementwise(F.mse_loss, student, teacher)


def elementwise(gap: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """An elementwise PyTorch loss in the memory order of the features: for transposed maps this saves a copy."""
    if student.is_contiguous() or not student.mT.is_contiguous():
        return gap(student, teacher, reduction="none")
    return gap(student.mT, teacher.mT, reduction="none").mT


def mean(x: Tensor) -> Tensor:
    """Mean over the width, as a sum and a division: the gradient of a sum is a view, that of a mean is a new tensor."""
    return x.sum(-1) / max(x.shape[-1], 1)
