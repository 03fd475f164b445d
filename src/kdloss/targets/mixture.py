"""Several teachers as one."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise


def mixture(
    teachers: Sequence[Float[Tensor, "*batch vocab"]],
    weights: Sequence[float] | None = None,
    *,
    temperature: float = 1.0,
    average: Literal["probabilities", "logits"] = "probabilities",
) -> Float[Tensor, "*batch vocab"]:
    r"""Logits of the weighted average of several teachers.

    "probabilities": $z$ with $\mathrm{softmax}(z/T) = \sum_k w_k\,\mathrm{softmax}(t_k/T)$;
    "logits": $z = \sum_k w_k t_k$. Weights default to equal ones. One teacher is returned as it is.

    Shapes: each teacher `[..., V]`. Returns `[..., V]`, in float32 or better, detached.

    Raises: ValueError for no teacher, shapes or devices that differ, or weights that are not one
    per teacher, non-negative and of sum 1; TypeError for integer logits.

    >>> half = mixture([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])])
    >>> half.softmax(-1)
    tensor([0.5000, 0.5000])

    You, Xu, Xu, Tao 2017, "Learning from Multiple Teacher Networks", KDD.
    """
    weights = checked_weights(weights, len(teachers))
    _checks.temperature(temperature)
    _checks.choice("average", average, ("probabilities", "logits"))
    for k, teacher in enumerate(teachers):
        _checks.floating(f"teacher {k}", teacher)
        if teacher.shape != teachers[0].shape or teacher.device != teachers[0].device:
            raise ValueError(
                f"teacher {k} has logits {tuple(teacher.shape)} on {teacher.device} and teacher 0 "
                f"{tuple(teachers[0].shape)} on {teachers[0].device}; teachers are averaged over one "
                "vocabulary, so truncate or map their last dimension to the student's first"
            )
    if len(teachers) == 1:
        return teachers[0].detach()
    logits = [precise(teacher.detach()) for teacher in teachers]
    if average == "logits":
        return torch.stack([w * z for w, z in zip(weights, logits, strict=True) if w > 0]).sum(0)
    log_probs = [
        math.log(w) + (z / temperature).log_softmax(-1)
        for w, z in zip(weights, logits, strict=True)
        if w > 0
    ]
    return torch.stack(log_probs).logsumexp(0) * temperature


def checked_weights(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """One non-negative weight per teacher, of sum 1."""
    if teachers == 0:
        raise ValueError("no teacher was given; pass a list of at least one teacher's output")
    if weights is None:
        return [1 / teachers] * teachers
    if len(weights) != teachers:
        raise ValueError(f"{len(weights)} weights for {teachers} teachers: {list(weights)}")
    if any(not w >= 0 for w in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"weights must be non-negative and sum to 1, got {list(weights)} (sum {sum(weights)})"
        )
    return [float(w) for w in weights]
