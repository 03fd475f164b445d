"""Relations between rows: Euclidean distances, angles, and distributions over rows."""

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

# Numbers computed at a time for each side: 1 MiB in float32.
AT_A_TIME = 2**18
# Up to this many are kept for the backward pass: 16 MiB in float32.
KEPT = 2**22
# Columns whose squares float32 adds up without losing digits.
COLUMNS = 128


def by_vertex(relations: Callable[..., Tensor], vertices: int, each: int, *tensors: Tensor | None) -> Tensor:
    """Call `relations(start, stop, *tensors)` for a few vertices at a time and concatenate along dimension 1.

    One vertex takes `each` numbers. Where all of them together are too many to keep, the backward pass recomputes them.
    """
    step = max(1, AT_A_TIME // max(1, each))
    again = partial(checkpoint, relations, use_reentrant=False, preserve_rng_state=False)
    run = again if each * vertices > KEPT else relations
    return torch.cat([run(k, min(k + step, vertices), *tensors) for k in range(0, max(vertices, 1), step)], 1)


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances between all rows, `[B, N, N]`. They come from differences: exact for near duplicates."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return _cdist(x)
    found: Tensor = _PairwiseDistances.apply(x)  # type: ignore[no-untyped-call]
    return found


def _cdist(x: Tensor) -> Tensor:
    """`torch.cdist`, a few columns at a time: it adds up numbers one by one, so wide rows would lose digits."""
    if x.shape[-1] <= COLUMNS:
        return _of_columns(x)
    return root(reduce(torch.add, (_of_columns(part).square() for part in torch.split(x, COLUMNS, -1))))


def _of_columns(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


class _PairwiseDistances(torch.autograd.Function):
    """`torch.cdist` of a tensor with itself: one gradient instead of two, and it can be differentiated twice."""

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
            return -(both[:, start:stop].unsqueeze(-1) * unit(relative_to(x, start, stop))).sum(2)

        return by_vertex(slopes, x.shape[1], x.numel(), x, both)


def kl_over(student: Tensor, teacher: Tensor, there: Tensor | None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax distributions over the rows in `there` (None: all); 0 if it holds none."""
    if not student.shape[-1]:
        return student.sum(-1)
    if there is None:
        return forward_kl(student, teacher, temperature=temperature)
    out = ~there & there.any(-1, keepdim=True)
    values = forward_kl(
        student.masked_fill(out, -torch.inf), teacher.masked_fill(out, -torch.inf), temperature=temperature
    )
    return fill(values, there.any(-1).expand(values.shape))


def angles(offsets: Tensor, keep: Tensor | None) -> Tensor:
    """Cosines of the angles at each vertex between any two rows, `[B, V, N, N]`.

    `offsets` are the rows relative to each vertex, `[B, V, N, D]`; `keep` says which count, `[B, V, N]` (None: all).
    The cosine is 0 where one of the two rows is at the vertex or does not count.
    """
    return gram(fill(unit(offsets), keep))


def relative_to(x: Tensor, start: int, stop: int) -> Tensor:
    """All rows relative to the vertices from start to stop, `[B, V, N, D]`."""
    return x.unsqueeze(1) - x[:, start:stop].unsqueeze(2)
