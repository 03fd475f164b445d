"""Relations of rows with each other: distances, angles, distributions over them."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdloss.distances._features import root, unit
from kdloss.distances._gram import gram
from kdloss.divergences import forward_kl
from kdloss.reduction import fill

# Numbers held for each side and step: 1 MiB in float32.
AT_A_TIME = 2**18
# Up to so many are kept: 16 MiB in float32.
KEPT = 2**22
# Of which a distance is added up in float32 without losing digits.
COLUMNS = 128


def by_vertex(relations: Callable[..., Tensor], vertices: int, each: int, *tensors: Tensor | None) -> Tensor:
    """`relations(start, stop, *tensors)` of all vertices, side by side along dimension 1; each takes so many numbers.

    Where there are many, nothing of it is kept for the backward pass, which computes it once more.
    """
    step = max(1, AT_A_TIME // max(1, each))
    again = partial(checkpoint, relations, use_reentrant=False, preserve_rng_state=False)
    run = again if each * vertices > KEPT else relations
    return torch.cat([run(k, min(k + step, vertices), *tensors) for k in range(0, max(vertices, 1), step)], 1)


def distances(x: Tensor) -> Tensor:
    """From every row to every row, `[B, N, N]`, from their differences: exact for near duplicates."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return _cdist(x)
    found: Tensor = _Distances.apply(x)  # type: ignore[no-untyped-call]
    return found


def _cdist(x: Tensor) -> Tensor:
    """By `torch.cdist`, which adds up one number after the other: a few columns at a time, or wide rows lose digits."""
    if x.shape[-1] <= COLUMNS:
        return _of_columns(x)
    return root(reduce(torch.add, (_of_columns(part).square() for part in torch.split(x, COLUMNS, -1))))


def _of_columns(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


class _Distances(torch.autograd.Function):
    """`torch.cdist` of one tensor with itself: one gradient instead of two, which can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _cdist(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        x, found = ctx.saved_tensors
        both = upstream + upstream.mT
        if not torch.is_grad_enabled():
            slope: Tensor = torch.ops.aten._cdist_backward(both, x, x, 2.0, found)
            return slope

        def slopes(start: int, stop: int, x: Tensor, both: Tensor) -> Tensor:
            return -(both[:, start:stop].unsqueeze(-1) * unit(seen_from(x, start, stop))).sum(2)

        return by_vertex(slopes, x.shape[1], x.numel(), x, both)


def kl_over(student: Tensor, teacher: Tensor, there: Tensor | None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of distributions over the rows that are there (None: all); 0 where there is none."""
    if not student.shape[-1]:
        return student.sum(-1)
    if there is None:
        return forward_kl(student, teacher, temperature=temperature)
    out = ~there & there.any(-1, keepdim=True)
    values = forward_kl(
        student.masked_fill(out, -torch.inf), teacher.masked_fill(out, -torch.inf), temperature=temperature
    )
    return fill(values, there.any(-1).expand(values.shape))


def angles(seen: Tensor, keep: Tensor | None) -> Tensor:
    """Cosines of the angles between any two of the rows `[B, V, N, D]` that are seen from a vertex, `[B, V, N, N]`.

    0 where one of the two is at the vertex, or does not count (keep `[B, V, N]`; None: all).
    """
    return gram(fill(unit(seen), keep))


def seen_from(x: Tensor, start: int, stop: int) -> Tensor:
    """All rows as seen from these, `[B, V, N, D]`."""
    return x.unsqueeze(1) - x[:, start:stop].unsqueeze(2)
