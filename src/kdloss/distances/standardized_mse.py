"""Mean squared error divided by the teacher's variance of each feature."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import mean, squared_gap
from kdloss.distances._rows import at_least_one, prepare_rows, spread
from kdloss.reduction import fill


def standardized_mse(
    student: Float[Tensor, "*batch rows width"],
    teacher: Float[Tensor, "*batch rows width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch rows"]:
    r"""Mean squared error with each feature divided by the teacher's variance of it, at every position.

    $\frac1D \sum_d \frac{(s_d - t_d)^2}{\sigma_d^2 + \epsilon}$ with $\sigma_d^2$ the variance of the
    teacher's feature d over all positions of all examples that count in the call, as in batch
    normalisation ($\epsilon$ is `eps`, as there). No few large dimensions dominate the sum. It is 1 for a student
    that returns the teacher's means. A feature that is constant counts as one with standard deviation
    $\sqrt\epsilon$.

    Shapes: student and teacher `[..., N, D]`, with or without a batch axis. `mask` is `[..., N]` (True =
    counts). Returns `[..., N]`, in float32 or better. The teacher is detached. The variance is that of the
    call, so micro-batches don't quite add up to one batch.

    Raises: ValueError for a single row, for shapes or devices that differ, and for maps (call `tokens` first);
    TypeError for integer features.

    >>> import torch
    >>> teacher = torch.tensor([[0.0, 100.0], [2.0, 300.0]])
    >>> standardized_mse(teacher.mean(0).expand(2, 2), teacher, eps=0)
    tensor([1., 1.])
    """
    s, t, keep = prepare_rows("standardized_mse", student, teacher, mask, same_width=True)
    n = at_least_one(t.shape[:2].numel() if keep is None else keep.sum())
    centred = fill(t - t.sum((0, 1)) / n, keep)
    variance = centred.square().sum((0, 1)) / n
    return spread(mean(squared_gap(s, t) / (variance + eps)), keep, student.shape[:-1])
