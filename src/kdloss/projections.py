"""Projections from the student's width to the teacher's."""

import torch
from torch import nn

__all__ = ["conv1x1", "linear", "mlp"]


def linear(student_width: int, teacher_width: int, *, orthogonal: bool = False, frozen: bool = False) -> nn.Module:
    """A linear map from `student_width` to `teacher_width`, for `FeatureKD(projection=...)`.

    On maps it acts as a 1x1 convolution. `orthogonal` initialises it with orthonormal rows or columns and zero bias,
    so that it preserves distances as far as the widths allow. `frozen` keeps it from being trained.

    >>> linear(64, 96)
    Linear(in_features=64, out_features=96, bias=True)

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.
    """
    return _started(nn.Linear(student_width, teacher_width), orthogonal, frozen)


def conv1x1(student_width: int, teacher_width: int, *, orthogonal: bool = False, frozen: bool = False) -> nn.Module:
    """A 1x1 convolution from `student_width` to `teacher_width` channels, for maps `[B, C, H, W]`.

    `orthogonal` and `frozen` are those of `linear`.

    A projection that contains an `nn.Conv2d` gets maps with channels first; one with an `nn.Conv1d` or `nn.Conv3d` gets
    features with one or three axes of positions after the channels. Every other projection gets the width last.

    >>> conv1x1(64, 96)
    Conv2d(64, 96, kernel_size=(1, 1), stride=(1, 1))

    Zagoruyko and Komodakis 2017, arXiv:1612.03928; Romero et al. 2015, arXiv:1412.6550.
    """
    return _started(nn.Conv2d(student_width, teacher_width, 1), orthogonal, frozen)


def mlp(student_width: int, teacher_width: int, *, hidden: int | None = None) -> nn.Module:
    """Two linear maps with a GELU between them, from `student_width` to `teacher_width`.

    `hidden` is the width between them, by default the teacher's.

    >>> mlp(64, 96, hidden=128)
    Sequential(
      (0): Linear(in_features=64, out_features=128, bias=True)
      (1): GELU(approximate='none')
      (2): Linear(in_features=128, out_features=96, bias=True)
    )

    Chen, Kornblith, Norouzi, Hinton 2020, "A Simple Framework for Contrastive Learning of Visual
    Representations", arXiv:2002.05709, use projection heads of this form.
    """
    hidden = hidden or teacher_width
    return nn.Sequential(nn.Linear(student_width, hidden), nn.GELU(), nn.Linear(hidden, teacher_width))


def convolves(module: nn.Module) -> int:
    """The number of axes that a projection convolves over; 0 for one that takes the width last."""
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    return next((n for part in module.modules() for kind, n in axes.items() if isinstance(part, kind)), 0)


def _started(module: nn.Linear | nn.Conv2d, orthogonal: bool, frozen: bool) -> nn.Module:
    if orthogonal:
        nn.init.orthogonal_(module.weight)
        with torch.no_grad():
            module.bias.zero_() if module.bias is not None else None
    return module.requires_grad_(not frozen)
