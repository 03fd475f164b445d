"""Summands of the KL family that don't lose digits where student and teacher are close."""

import torch
from torch import Tensor

NO_MASS = -80.0  # e^-80 beside 1 is nothing, and still a normal number in float32


def kl_terms(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """A log(a/b) + b - a: the added b - a sums to 0 and makes every summand non-negative.

    With the gap d = log(b/a) it is a (exp(d) - 1 - d), and it is computed so where d is small: at high T everywhere.
    """
    there = a > 0
    gap = torch.where(there, gap, 0)
    near = gap.clamp(-0.5, 0.5)
    return torch.where(there & (gap == near), a * (near.expm1() - near), (b - a) - a * gap)


def mixture_terms(a: Tensor, b: Tensor, m: Tensor, other: float) -> Tensor:
    """A log(a/m) + m - a with m = (1 - other) a + other b; neither a nor b is 0."""
    return a * log_ratio(a, b, m, other) - other * (a - b)


def log_ratio(a: Tensor, b: Tensor, m: Tensor, other: float) -> Tensor:
    """log(a/m), computed as log(1 + (a - m)/m), where a - m is known without rounding, unless a is much below m."""
    ratio = other * (a - b) / m
    return torch.where(ratio > -0.5, ratio.clamp_min(-0.5).log1p(), a.log() - m.log())


def mixed(a: Tensor, b: Tensor, share: float, out: Tensor | None = None) -> Tensor:
    """Share times a plus (1 - share) times b; from the nearer side, so that small shares lose no digits."""
    if share <= 0.5:
        return torch.lerp(b, a, share, out=out)
    return torch.lerp(a, b, 1 - share, out=out)
