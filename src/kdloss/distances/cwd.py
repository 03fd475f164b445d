"""Channel-wise distillation."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._relations import kl_over
from kdloss.distances._rows import prepare_rows, spread


def cwd(
    student: Float[Tensor, "*batch rows width"],
    teacher: Float[Tensor, "*batch rows width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    temperature: float = 4.0,
) -> Float[Tensor, "*batch rows"]:
    r"""KL between the softmax of each channel over the positions, mean over the channels.

    $\frac{T^2}{D} \sum_c \sum_n p_{nc} \log \frac{p_{nc}}{q_{nc}}$ with $p_{\cdot c} =
    \mathrm{softmax}(t_{\cdot c}/T)$ over the N positions of an example: every position gets the same value, the
    paper's loss for one example. `temperature` (T) is by default that of the paper's segmentation models.

    Shapes: student and teacher `[..., N, D]`: the positions of each example, for a map
    `kdloss.distances.tokens(map)`. `mask` is `[..., N]` (True = counts). Returns `[..., N]`, in float32 or better. The
    teacher is detached. Rows are compared with each other.

    Raises: ValueError for a single row, a temperature that is not finite and positive, shapes or devices
    that differ, and maps (call `tokens` first); TypeError for integer features.

    >>> import torch
    >>> cwd(torch.zeros(2, 1), torch.tensor([[0.0], [-1e4]]), temperature=1.0)  # log 2
    tensor([0.6931, 0.6931])

    Shu, Liu, Gao, Yan, Shen 2021, "Channel-wise Knowledge Distillation for Dense Prediction",
    arXiv:2011.13256, and their code.
    """
    s, t, keep = prepare_rows("cwd", student, teacher, mask, same_width=True)
    values = kl_over(s.mT, t.mT, None if keep is None else keep.unsqueeze(1), temperature)
    return spread(values.mean(-1, keepdim=True), keep, student.shape[:-1])
