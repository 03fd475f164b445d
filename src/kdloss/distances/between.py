"""Change what a distance compares: all positions of a batch, or its examples."""

from collections.abc import Callable
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from kdloss.distances._rows import any_width, count, needs_no_width
from kdloss.reduction import fill, passes_on, takes

Distance = Callable[..., Tensor]


def tokens(features: Tensor) -> Tensor:
    """Flatten a map `[B, C, H, W]` to positions `[B, H·W, C]`, a volume too; return other `features` as they are.

    >>> import torch
    >>> tokens(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 16, 3])
    """
    return rearrange(features, "b c ... -> b (...) c") if features.ndim > 3 else features


def between_tokens(distance: Distance) -> Distance:
    """Make a distance that compares all positions of a batch with each other, across examples.

    A `distance` with a `mask` compares the rows of one example `[N, D]`. The new one reshapes `[B, N, D]` to
    `[B·N, D]` first. Shapes, options and errors are those of the distance.

    >>> import kdloss, torch
    >>> student, teacher = torch.randn(2, 4, 3, 8)
    >>> kdloss.distances.between_tokens(kdloss.distances.cka)(student, teacher).shape
    torch.Size([4, 3])
    """
    return _as(partial(_between_tokens, _relational(distance)), distance)


def between_examples(distance: Distance, *, mean: bool = False) -> Distance:
    """Make a distance that compares the examples of a batch with each other.

    It turns features `[B, N, D]` into one vector for each example before it calls `distance`. The vector is the
    flattened features (in memory order, if that is the same on both sides). With `mean=True` it is the mean over the
    positions that count: use that for text, whose positions don't correspond. Every position gets the value of its
    example. Shapes, options and errors are those of the distance.

    >>> import kdloss, torch
    >>> student, teacher = torch.randn(2, 4, 3, 8)
    >>> kdloss.distances.between_examples(kdloss.distances.similarity)(student, teacher).shape
    torch.Size([4, 3])
    """
    return _as(partial(_between_examples, _relational(distance), mean), distance)


def _between_tokens(
    distance: Distance, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, **options: Any
) -> Tensor:
    flat = None if mask is None else mask.flatten()
    if student.ndim != 3:
        return distance(student, teacher, mask=mask, **options)
    values = distance(student.flatten(0, 1), teacher.flatten(0, 1), mask=flat, **options)
    return values.view(student.shape[:-1])


def _between_examples(
    distance: Distance,
    mean: bool,
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if student.ndim != 3:
        return distance(student, teacher, mask=mask, **options)
    shape, there = student.shape[:-1], None if mask is None else mask.any(-1)
    sides = [fill(x, mask) for x in (student, teacher)]
    if mean:
        sides = [(x.sum(-2, keepdim=True) / count(mask, x)).squeeze(-2) for x in sides]
    else:
        stacked = all(x.mT.is_contiguous() for x in sides)  # maps: this order needs no copy
        sides = [(x.mT if stacked else x).flatten(1) for x in sides]
    values = distance(*sides, mask=there, **options)
    return fill(values.unsqueeze(-1).expand(shape), mask)


def _relational(distance: Distance) -> Distance:
    if not (takes(distance, "mask") or passes_on(distance)):
        raise TypeError(
            f"{getattr(distance, '__name__', distance)} compares each position with its own partner only; "
            "give it to FeatureKD(distance=...) as it is"
        )
    return distance


def _as(compared: partial[Tensor], distance: Distance) -> Distance:
    return any_width(compared) if needs_no_width(distance) else compared
