"""Activation boundaries: which neurons are on."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, mean


def activation_boundary(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    *,
    margin: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Squared hinge loss that moves each student neuron to the side of 0 where the teacher's neuron is.

    $\frac1D \sum_d \max(0,\, m - \sigma_d s_d)^2$ with $\sigma_d = 1$ where the teacher's activation is
    above 0, and −1 elsewhere. Give the activations before the ReLU, for both sides. This is the authors'
    margin form; they sum over features and positions with weights of their own. Only the teacher's side of 0
    counts, and how far the student is from being `margin` (m) beyond it. The loss is therefore 0 for a
    student beyond the margin, and not 0 at a teacher whose activations are smaller than the margin. It
    compares neuron with neuron and position with position; `nst` compares patterns over positions, whichever
    neuron shows them.

    Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher is detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> activation_boundary(torch.tensor([2.0, 0.5]), torch.tensor([0.1, -3.0]))  # (0 + 1.5²) / 2
    tensor(1.1250)

    Heo, Lee, Yun, Choi 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons", arXiv:1811.03233, and their code.
    """
    student, teacher = features(student, teacher)
    side = torch.where(teacher > 0, 1.0, -1.0)
    return mean((margin - side * student).relu().square())
