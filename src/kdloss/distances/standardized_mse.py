"""Mean squared error in units of the teacher's standard deviation of each feature."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import mean, squared_gap
from kdloss.distances._rows import at_least_one, rows, spread
from kdloss.reduction import fill


def standardized_mse(
    student: Float[Tensor, "*batch rows width"],
    teacher: Float[Tensor, "*batch rows width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch rows"]:
    r"""Mean squared error at every position, each feature over the teacher's variance of it.

    $\frac1D \sum_d \frac{(s_d - t_d)^2}{\sigma_d^2 + \epsilon}$ with $\sigma_d^2$ the variance of the
    teacher's feature d over all positions that count in the call, of all examples (as batch normalisation
    has it, of which `eps` is, too): no few large dimensions rule the sum. 1 for a student that gives the
    teacher's means. A feature that is the same everywhere counts as one of standard deviation
    $\sqrt\epsilon$.

    Shapes: student and teacher `[..., N, D]`, with or without a batch before them. `mask` is `[..., N]` (True =
    counts). Returns `[..., N]`, in float32 or better. The teacher is detached. The variance is that of the
    batch: micro-batches don't quite add up to one batch.

    Raises: ValueError for one row alone, shapes or devices that differ, or maps that are not rows;
    TypeError for integer features.

    >>> import torch
    >>> teacher = torch.tensor([[0.0, 100.0], [2.0, 300.0]])
    >>> standardized_mse(teacher.mean(0).expand(2, 2), teacher, eps=0)
    tensor([1., 1.])
    """
    s, t, keep = rows("standardized_mse", student, teacher, mask, same_width=True)
    n = at_least_one(t.shape[:2].numel() if keep is None else keep.sum())
    centred = fill(t - t.sum((0, 1)) / n, keep)
    variance = centred.square().sum((0, 1)) / n
    return spread(mean(squared_gap(s, t) / (variance + eps)), keep, student.shape[:-1])
