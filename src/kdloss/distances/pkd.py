"""Patient knowledge distillation."""

from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, squared_gap, unit


def pkd(student: Float[Tensor, "*batch width"], teacher: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    r"""Squared distance between the features scaled to length 1, at every position.

    $\left\| \frac{s}{\|s\|} - \frac{t}{\|t\|} \right\|^2$: the paper's sum over the width (their code takes
    the mean, which is D times smaller). It is twice `cosine`. The paper applies it to BERT's [CLS] token at each
    pair of layers: for that, give a mask that keeps that position alone. A zero vector stays zero.

    Shapes: student and teacher `[..., D]`. Returns `[...]` between 0 and 4, in float32 or better. The
    teacher is detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> pkd(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0]))
    tensor(2.)

    Sun, Cheng, Gan, Liu 2019, "Patient Knowledge Distillation for BERT Model Compression",
    arXiv:1908.09355.
    """
    student, teacher = features(student, teacher)
    return squared_gap(unit(student), unit(teacher)).sum(-1)
