"""Closed forms of the divergences by powers and squares of probabilities, as pure functions of both sides."""

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine import closed_forms, powers
from kdloss.engine.closed_forms import nan
from kdloss.engine.side import Side


def ab_divergence(q: Side, p: Side, *, alpha: float = 0.2, beta: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of (q^(a+b) b/(a+b) + p^(a+b) a/(a+b) - p^a q^b) / (ab); slope q^b (q^a - p^a) / a."""
    check(alpha, beta)
    log_q, log_p, gap = _logs(q, p)
    # Small differences, multiplied by T² or divided by a number near 0.
    careful = q.flat or max(abs(alpha), abs(beta), abs(alpha + beta)) < 0.05
    summands = powers.terms if careful else powers.simple_terms
    value = q.sum(_number(summands(log_q, log_p, gap, alpha, beta)))
    slope = _number(powers.slope(log_q, log_p, gap, alpha, beta))
    return value + nan(q, p), slope, q.sum(slope) + nan(q, p)


def alpha_divergence(q: Side, p: Side, *, alpha: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - sum of p^a q^(1-a)) / (a(1-a)); slope (q - p^a q^(1-a)) / a, of sum (1-a) times the value."""
    _checks.number("alpha", alpha)
    log_q, log_p, gap = _logs(q, p)
    beta = 1 - alpha
    slope = _number(powers.slope(log_q, log_p, gap, alpha, beta))
    balance = q.sum(slope) + nan(q, p)
    if q.flat:
        value = q.sum(_number(powers.terms(log_q, log_p, gap, alpha, beta)))
    elif beta >= 0.5:
        value = balance / beta
    else:  # from the slope by log p
        value = q.sum(_number(powers.slope(log_p, log_q, -gap, beta, alpha))) / alpha
    return value + nan(q, p), slope, balance


def renyi(q: Side, p: Side, *, order: float = 0.5) -> tuple[Tensor, Tensor, Tensor | None]:
    """log(sum of p^a q^(1-a)) / (a-1); slope q - r, r the summands divided by their sum; the slope's sum is 0."""
    _checks.positive("order", order)
    if order == 1:
        return closed_forms.forward_kl(q, p)
    log_q, log_p, gap = _logs(q, p)
    u = (order * log_p + (1 - order) * log_q).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    top = u.amax(-1, keepdim=True)
    top = top if q.shard is None else q.shard.max(top)
    top = top.masked_fill(top.isinf(), 0)
    log_sum = q.sum((u - top).exp()).log() + top
    small, _, _ = alpha_divergence(q, p, alpha=order)
    log_sum = powers.log_of_sum(small, log_sum, order)
    by_row = log_sum.to(u.dtype)
    slope = powers.difference(log_q, u - by_row, order * gap + by_row)
    return log_sum / (order - 1) + nan(q, p), _number(slope), nan(q, p)


def triangular(q: Side, p: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of (p+q) t², t = (q-p) / (q+p); slope q t (2-t)."""
    t = _number((q.log_ratio_to(p) / 2).tanh_())
    slope = q.probs * t * (2 - t)
    return q.sum((q.probs + p.probs) * t.square_()) + nan(q, p), slope, q.sum(slope) + nan(q, p)


def check(alpha: float, beta: float) -> None:
    """Raise for exponents that give no alpha-beta divergence here."""
    if _checks.number("alpha", alpha) + _checks.number("beta", beta) < 0:
        raise ValueError(
            f"alpha + beta must be 0 or more, got {alpha!r} and {beta!r}: with a negative sum the classes that the "
            "teacher finds unlikely would outweigh all others"
        )


def _logs(q: Side, p: Side) -> tuple[Tensor, Tensor, Tensor]:
    return q.log_probs(), p.log_probs(), q.log_ratio_to(p)


def _number(rows: Tensor) -> Tensor:
    """Replace 0 times infinity by 0: neither side has mass there, or the infinite number has no weight."""
    return rows.nan_to_num_(0.0, torch.inf, -torch.inf)
