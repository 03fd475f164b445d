"""Flow of the solution procedure (FSP)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap
from kdloss.distances._rows import count, prepare_rows, product, spread


def fsp(
    student: Float[Tensor, "*batch rows width"],
    teacher: Float[Tensor, "*batch rows width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    split: int | None = None,
) -> Float[Tensor, "*batch rows"]:
    r"""Squared difference between the FSP matrices: products of an early and a late layer's features.

    $\|G^s - G^t\|_F^2$ with $G = \frac1N F_1^\top F_2$ over the N positions of an example. Every position
    gets the same value. It is the paper's sum over the entries of G; other code takes their mean.

    Shapes: student and teacher `[..., N, D]`, where the first `split` features come from the early layer
    and the others from the late one; by default each layer has half. Write `torch.cat([early, late], -1)` of two layers
    at the same positions (a map: `kdloss.distances.tokens(torch.cat([early, late], 1))`). `mask` is `[..., N]` (True =
    counts). Returns `[..., N]`, in float32 or better. The teacher is detached. Positions are summed
    before the difference, so micro-batches of positions don't add up to one batch.

    Raises: ValueError for shapes or devices that differ, a split that leaves one side empty, and maps
    (call `tokens` first); TypeError for integer features.

    >>> import torch
    >>> early, late = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    >>> fsp(torch.zeros(2, 2), torch.cat([early, late], -1))  # ((3 + 8) / 2)²
    tensor([30.2500, 30.2500])

    Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
    and Transfer Learning", CVPR.
    """
    s, t, keep = prepare_rows("fsp", student, teacher, mask, same_width=True, least=1)
    width = s.shape[-1]
    early = width // 2 if split is None else split
    if not 0 < early < width:
        raise ValueError(
            f"fsp takes two layers side by side, got split={early} of width {width}; write "
            "torch.cat([early, late], -1) and split=early.shape[-1]"
        )
    values = squared_gap(_flow(s, keep, early), _flow(t, keep, early)).sum((-2, -1))
    return spread(values.unsqueeze(-1), keep, student.shape[:-1])


def _flow(x: Tensor, keep: Tensor | None, early: int) -> Tensor:
    first, second = torch.split(x.mT, [early, x.shape[-1] - early], -2)
    return product(first, second) / count(keep, x)
