"""Both sides of a distance between features."""

from torch import Tensor, nn

from kdloss import _checks
from kdloss.reduction import precise


def features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Checked features of student and detached teacher, in float32 or better."""
    _checks.pair("features", student, teacher)
    return precise(student), precise(teacher.detach())


def weights(layer: nn.Linear | nn.Conv2d, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias in the features' dtype."""
    bias = layer.bias
    return layer.weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
