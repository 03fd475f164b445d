"""Both sides of a distance between features."""

from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise


def features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Checked features of student and detached teacher, in float32 or better."""
    _checks.pair("features", student, teacher)
    return precise(student), precise(teacher.detach())
