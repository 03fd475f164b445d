"""Relations of rows with each other: distances, angles, distributions over them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdloss.distances._features import length, unit
from kdloss.distances._rows import product
from kdloss.divergences import forward_kl
from kdloss.reduction import fill

# Numbers held for each side and step: 1 MiB in float32.
AT_A_TIME = 2**18


def by_vertex(relations: Callable[..., Tensor], *tensors: Tensor, cubic: bool = False) -> Tensor:
    """`relations(start, stop, *tensors)` of all vertices, side by side along dimension 1.

    Nothing of it is kept for the backward pass, which computes it once more: memory grows with N² at most.
    """
    batch, rows, width = tensors[0].shape
    step = max(1, AT_A_TIME // max(1, batch * rows * (width + rows * cubic)))
    parts = [
        checkpoint(
            relations,
            start,
            min(start + step, rows),
            *tensors,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, max(rows, 1), step)
    ]
    return torch.cat(parts, 1)


def distances(x: Tensor) -> Tensor:
    """From every row to every row, `[B, N, N]`, from their differences: exact for near duplicates."""

    def relations(start: int, stop: int, x: Tensor) -> Tensor:
        return length(_from(x, start, stop))

    return by_vertex(relations, x)


def kl_over(student: Tensor, teacher: Tensor, there: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of distributions over the rows that are there; 0 where there is none."""
    if not student.shape[-1]:
        return student.sum(-1)
    out = ~there & there.any(-1, keepdim=True)
    values = forward_kl(
        student.masked_fill(out, -torch.inf), teacher.masked_fill(out, -torch.inf), temperature=temperature
    )
    return fill(values, there.any(-1).expand(values.shape))


def angles(x: Tensor, start: int, stop: int, keep: Tensor) -> Tensor:
    """Cosines of the angles at these vertices between any two of the rows that count, `[B, V, N, N]`.

    0 where one of the two is at the vertex, or does not count (keep `[B, N]`, or `[B, V, N]`).
    """
    arms = fill(unit(_from(x, start, stop)), keep)
    return product(arms, arms)


def _from(x: Tensor, start: int, stop: int) -> Tensor:
    """All rows as seen from these, `[B, V, N, D]`."""
    return x.unsqueeze(1) - x[:, start:stop].unsqueeze(2)
