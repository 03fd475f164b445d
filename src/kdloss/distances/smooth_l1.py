"""Smooth L1."""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import elementwise, features, mean


def smooth_l1(
    student: Float[Tensor, "*batch width"], teacher: Float[Tensor, "*batch width"], *, beta: float = 1.0
) -> Float[Tensor, "*batch"]:
    r"""Smooth L1 (Huber) loss: squared error below `beta`, absolute error above, mean over the width.

    $\frac1D \sum_d \ell(s_d - t_d)$ with $\ell(x) = \frac{x^2}{2\beta}$ for $|x| < \beta$ and $|x| -
    \frac\beta2$ above it: an outlier's gradient is bounded.

    Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher is detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> smooth_l1(torch.tensor([1.0, 8.0]), torch.tensor([0.0, 0.0]))  # (0.5 + 7.5) / 2
    tensor(4.)

    Girshick 2015, "Fast R-CNN", arXiv:1504.08083.
    """
    student, teacher = features(student, teacher)
    return mean(elementwise(partial(F.smooth_l1_loss, beta=beta), student, teacher))
