"""From the student's width to the teacher's."""

from torch import nn


def projection(student_width: int, teacher_width: int) -> nn.Module:
    """A trained linear map where the widths differ, nothing where they agree.

    Features come with the width last (maps too), so that this is a 1x1 convolution on maps.

    >>> projection(64, 64), projection(64, 96)
    (Identity(), Linear(in_features=64, out_features=96, bias=True))

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.
    """
    if student_width == teacher_width:
        return nn.Identity()
    return nn.Linear(student_width, teacher_width)


def fits(module: nn.Module, student_width: int, teacher_width: int) -> bool:
    """Whether a projection is one between these widths."""
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features) == (student_width, teacher_width)
    return student_width == teacher_width
