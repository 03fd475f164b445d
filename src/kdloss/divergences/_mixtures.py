"""Divergences from a mixture of student and teacher, with precise gradients.

Autograd's own gradient of these is a difference of large terms. Here the gradient is the slope by log q, written so
that each term vanishes where q and p are equal; autograd can differentiate it again.
"""

from typing import Any

import torch
from torch import Tensor

from kdloss.engine.terms import NO_MASS, log_ratio, mixed, mixture_terms


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    return _apply(_JSD, log_q, log_p, beta)


def to_mixture(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q)."""
    return _apply(_ToMixture, log_q, log_p, skew)


def from_student(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    """KL(q || (1 - skew) p + skew q)."""
    return _apply(_FromStudent, log_q, log_p, skew)


class _WithSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        log_q, log_p, ctx.share = inputs
        ctx.save_for_backward(log_q, log_p)


class _JSD(_WithSlope):
    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
        q, p = _mass(log_q), _mass(log_p)
        m = mixed(p, q, beta)
        to_teacher, to_student = mixture_terms(p, q, m, 1 - beta), mixture_terms(q, p, m, beta)
        return (beta * to_teacher + (1 - beta) * to_student).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        q, p = (_mass(x) for x in ctx.saved_tensors)
        slope = (1 - ctx.share) * q * log_ratio(q, p, mixed(p, q, ctx.share), ctx.share)
        return upstream.unsqueeze(-1) * slope, None, None


class _ToMixture(_WithSlope):
    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
        q, p = _mass(log_q), _mass(log_p)
        return mixture_terms(p, q, mixed(p, q, skew), 1 - skew).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        q, p = (_mass(x) for x in ctx.saved_tensors)
        slope = (1 - ctx.share) ** 2 * q * (q - p) / mixed(p, q, ctx.share)
        return upstream.unsqueeze(-1) * slope, None, None


class _FromStudent(_WithSlope):
    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
        q, p = _mass(log_q), _mass(log_p)
        return mixture_terms(q, p, mixed(q, p, skew), 1 - skew).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        q, p = (_mass(x) for x in ctx.saved_tensors)
        m, other = mixed(q, p, ctx.share), 1 - ctx.share
        slope = q * (log_ratio(q, p, m, other) + ctx.share * other * (p - q) / m)
        return upstream.unsqueeze(-1) * slope, None, None


def _mass(log_p: Tensor) -> Tensor:
    return log_p.clamp_min(NO_MASS).exp()


def _apply(function: Any, *args: Any) -> Tensor:
    """Apply the function with its own slope; under a compiler the plain formula, which it differentiates itself."""
    value: Tensor = function.forward(*args) if torch.compiler.is_compiling() else function.apply(*args)
    return value
