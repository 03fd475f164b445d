"""Divergences by powers of probabilities, with precise gradients and derivatives of any order."""

from typing import Any

import torch
from torch import Tensor

from kdloss.engine import powers


def ab(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence of log-probabilities; a class that both sides exclude adds nothing."""
    none = (log_q == -torch.inf) & (log_p == -torch.inf)
    return _value(_AB, _ABSlope, log_q.masked_fill(none, 0), log_p.masked_fill(none, 0), alpha, beta)


def renyi(log_q: Tensor, log_p: Tensor, order: float) -> Tensor:
    """Rényi divergence of log-probabilities."""
    return _value(_Renyi, _RenyiSlope, log_q, log_p, order)


class _OfLogs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        log_q, log_p, *ctx.options = inputs
        ctx.save_for_backward(log_q, log_p)


class _ABSlope(_OfLogs):
    """The slope S; its own derivative is beta S + q^(alpha + beta)."""

    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
        slope = powers.slope(log_q, log_p, log_q - log_p, alpha, beta)
        return _number(slope) + _nan(log_q, log_p).unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (log_q, log_p), (alpha, beta) = ctx.saved_tensors, ctx.options
        mass = (log_q * (alpha + beta)).exp() if alpha + beta else torch.ones_like(log_q)
        return upstream * (beta * _applied(_ABSlope, log_q, log_p, alpha, beta) + mass), None, None, None


class _AB(_OfLogs):
    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
        summands = powers.terms(log_q, log_p, log_q - log_p, alpha, beta)
        return _number(summands).sum(-1) + _nan(log_q, log_p)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream.unsqueeze(-1) * _applied(_ABSlope, *ctx.saved_tensors, *ctx.options), None, None, None


class _RenyiSlope(_OfLogs):
    """Q - r with r = p^order q^(1-order) / sum: the slope up to a multiple of q, which a softmax removes."""

    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, order: float) -> Tensor:
        log_sum = _log_sum(log_q, log_p, order).unsqueeze(-1)
        log_r = _exponents(log_q, log_p, order) - log_sum
        slope = powers.difference(log_q, log_r, order * (log_q - log_p) + log_sum)
        return _number(slope) + _nan(log_q, log_p).unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (log_q, log_p), (order,) = ctx.saved_tensors, ctx.options
        r = _exponents(log_q, log_p, order).softmax(-1)
        of_r = r * (upstream - (r * upstream).sum(-1, keepdim=True))
        return upstream * log_q.exp() - (1 - order) * of_r, None, None


class _Renyi(_OfLogs):
    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, order: float) -> Tensor:
        return _log_sum(log_q, log_p, order) / (order - 1) + _nan(log_q, log_p)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream.unsqueeze(-1) * _applied(_RenyiSlope, *ctx.saved_tensors, *ctx.options), None, None


def _exponents(log_q: Tensor, log_p: Tensor, order: float) -> Tensor:
    none = (log_q == -torch.inf) & (log_p == -torch.inf)
    return (order * log_p + (1 - order) * log_q).masked_fill(none, -torch.inf)


def _log_sum(log_q: Tensor, log_p: Tensor, order: float) -> Tensor:
    """Log of the sum of p^order q^(1-order)."""
    value = _number(powers.terms(log_q, log_p, log_q - log_p, order, 1 - order)).sum(-1)
    return powers.log_of_sum(value, _exponents(log_q, log_p, order).logsumexp(-1), order)


def _number(terms: Tensor) -> Tensor:
    """Replace 0 times infinity by 0: neither side has mass there, or the infinite number has no weight."""
    return terms.nan_to_num(0.0, torch.inf, -torch.inf)


def _nan(log_q: Tensor, log_p: Tensor) -> Tensor:
    """0 in each row, or NaN where the row holds one."""
    return (log_q.amax(-1) + log_p.amax(-1)) * 0


def _value(function: Any, slope_of: Any, log_q: Tensor, *args: Any) -> Tensor:
    """Apply the function with its own slope; under a compiler the slope is a constant."""
    if not torch.compiler.is_compiling():
        return _applied(function, log_q, *args)
    with torch.no_grad():
        value, slope = function.forward(log_q, *args), slope_of.forward(log_q, *args)
    here = log_q.masked_fill(log_q == -torch.inf, 0)
    number: Tensor = value + (slope * (here - here.detach())).sum(-1)
    return number


def _applied(function: Any, *args: Any) -> Tensor:
    value: Tensor = function.apply(*args)
    return value
