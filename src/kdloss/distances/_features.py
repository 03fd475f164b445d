"""Both sides of a distance between features."""

from collections.abc import Callable

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


def length(x: Tensor) -> Tensor:
    """Lengths `[...]` of vectors `[..., D]`; a zero vector gets no gradient of any order."""
    return _where_not_zero(x.square().sum(-1), Tensor.sqrt)


def _where_not_zero(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    zero = x == 0
    return function(x.masked_fill(zero, 1)).masked_fill(zero, 0)
