"""Mean squared error divided by the teacher's mean square."""

from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, mean, squared_gap


def normalized_mse(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    *,
    eps: float = 1e-6,
) -> Float[Tensor, "*batch"]:
    r"""Mean squared error divided by the mean square of the teacher's features, at every position.

    $\frac{\sum_d (s_d - t_d)^2}{\sum_d t_d^2 + D\,\epsilon}$: 0 at the teacher, and 1 for a student
    that returns zeros, whatever the size of the teacher's features. $\epsilon$ is `eps`.

    Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher is
    detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> normalized_mse(torch.zeros(2), torch.tensor([30.0, 40.0]))
    tensor(1.)
    """
    student, teacher = features(student, teacher)
    return mean(squared_gap(student, teacher)) / (teacher.square().mean(-1) + eps)
