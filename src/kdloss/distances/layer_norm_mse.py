"""Mean squared error between layer-normalised features."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss.distances._features import features, mean, squared_gap


def layer_norm_mse(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch"]:
    r"""Mean squared error after layer normalisation of both sides, at every position.

    $\frac{1}{D}\sum_d (\mathrm{LN}(s)_d - \mathrm{LN}(t)_d)^2$ with
    $\mathrm{LN}(x) = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon}$, without learned scale; $\epsilon$ is `eps`.
    A shift or a positive scale of either side does not change it. It is about 2 for unrelated features, and at most 4.

    Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher is
    detached.

    Raises: ValueError for shapes or devices that differ; TypeError for integer features.

    >>> import torch
    >>> layer_norm_mse(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 40.0])) < 1e-4
    tensor(True)

    Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv:1607.06450.
    """
    student, teacher = features(student, teacher)
    width = student.shape[-1:]
    return mean(squared_gap(F.layer_norm(student, width, eps=eps), F.layer_norm(teacher, width, eps=eps)))
