"""Mean squared error."""

from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, mean, squared_gap


def mse(student: Float[Tensor, "*batch width"], teacher: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    r"""Mean squared error at every position.

    $\frac{1}{D}\sum_d (s_d - t_d)^2$

    Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher is
    detached. A few outlier dimensions of a language model can outweigh all others: see
    `normalized_mse` and `layer_norm_mse`.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.
    """
    student, teacher = features(student, teacher)
    return mean(squared_gap(student, teacher))
