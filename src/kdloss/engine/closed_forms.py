r"""Values and slopes of divergences $\sum_v f(p_v, q_v)$ without autograd, in the rows they are given.

Each takes the student's side q, the teacher's p and `new`, which hands out memory for results, and returns
the value of each row, the slope $q\,\partial f/\partial q$ in memory that the caller may write to, and the
slope's sum over classes (None for 0). The gradient by the student's logits is then (slope - q * sum) / T.
They are functions: q and p stay as they are, since other divergences read them, too.
The plain functions in `kdloss.divergences` are the specification.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine.side import LN2, NO_BITS, New, Side
from kdloss.engine.terms import kl_terms, log_ratio, mixed, mixture_terms

ClosedForm = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def _nan(q: Side, p: Side) -> Tensor:
    """0 for rows of numbers: so that what 0 log 0 is made of hides no NaN among the logits."""
    return (q.log_total - p.log_total) * 0


def forward_kl(q: Side, p: Side, new: New) -> tuple[Tensor, Tensor, None]:
    """Sum of p log(p/q); slope q - p up to p's and q's sums of 1."""
    if q.flat:
        return _kl(p, q), torch.sub(q.probs, p.probs, out=new()), None
    out = new()
    terms = p.log_ratio_to(q, out).mul_(p.probs).nan_to_num_(0.0, posinf=torch.inf)
    value = q.sum(terms) + _nan(q, p)
    return value, torch.sub(q.probs, p.probs, out=out), None


def reverse_kl(q: Side, p: Side, new: New) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of q log(q/p); slope q log(q/p)."""
    slope = q.log_ratio_to(p, new()).mul_(q.probs).nan_to_num_(0.0, posinf=torch.inf)
    value = q.sum(slope) + _nan(q, p)
    return _kl(q, p) if q.flat else value, slope, value


def symmetric_kl(q: Side, p: Side, new: New) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of (q - p) log(q/p); slope q log(q/p) + q - p."""
    out = new()
    log = q.log_ratio_to(p, out)
    slope = torch.mul(log, q.probs, out=new()).nan_to_num_(0.0, posinf=torch.inf)
    reverse = q.sum(slope) + _nan(q, p)
    forward = q.sum(log.mul_(p.probs).nan_to_num_(0.0, neginf=-torch.inf))
    slope.add_(torch.sub(q.probs, p.probs, out=out))
    return _kl(p, q) + _kl(q, p) if q.flat else reverse - forward, slope, reverse


def jsd(
    q: Side, p: Side, new: New, *, beta: float = 0.5, normalize: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of beta p log(p/m) + (1-beta) q log(q/m); slope (1-beta) q log(q/m)."""
    _checks.fraction("beta", beta)
    if beta == 0:
        return forward_kl(q, p, new)
    if beta == 1:
        return reverse_kl(q, p, new)
    size = 1 / (beta * (1 - beta)) if normalize else 1.0
    # Results take the memory of what was read for the last time: three buffers are enough.
    first, second, third = new(), new(), new()
    a, b = q.smooth(first), p.smooth(second)
    if q.flat or not 0.05 <= beta <= 0.95:  # small differences, multiplied by T² or 1/beta
        m = mixed(b, a, beta, out=third)  # equal to q where p is, to the last bit
        terms = beta * mixture_terms(b, a, m, 1 - beta) + (1 - beta) * mixture_terms(a, b, m, beta)
        slope = log_ratio(a, b, m, beta).mul_(a).mul_((1 - beta) * size)
        return q.sum(terms) * size, slope, q.sum(slope)
    log = torch.div(a, mixed(b, a, beta, out=second), out=second).log_()
    bits = torch.clamp(p.bits, min=NO_BITS, out=first), torch.clamp(q.bits, min=NO_BITS, out=third)
    teacher = q.sum(p.log_ratio_to(q, first, bits).add_(log).mul_(p.probs)) * (beta * size)
    slope = log.mul_(q.probs).mul_((1 - beta) * size)
    student = q.sum(slope)
    return teacher + student, slope, student


def skewed_forward_kl(q: Side, p: Side, new: New, *, skew: float = 0.1) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of p log(p/m), m = skew p + (1-skew) q; slope (1-skew)^2 q (q-p) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return forward_kl(q, p, new)
    first, second = new(), new()
    a, b = q.smooth(first), p.smooth(second)
    if q.flat:
        m = mixed(b, a, skew)
        value = q.sum(mixture_terms(b, a, m, 1 - skew))
    else:
        m = mixed(b, a, skew, out=first)
        value = q.sum(torch.div(b, m, out=second).log_().mul_(p.probs))
    slope = torch.sub(q.probs, p.probs, out=second).mul_(q.probs).div_(m).mul_((1 - skew) ** 2)
    return value, slope, q.sum(slope)


def skewed_reverse_kl(q: Side, p: Side, new: New, *, skew: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of q log(q/m), m = (1-skew) p + skew q; slope q log(q/m) + skew (1-skew) q (p-q) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return reverse_kl(q, p, new)
    first, second, third = new(), new(), new()
    a, b = q.smooth(first), p.smooth(second)
    m = mixed(a, b, skew, out=third)
    value = q.sum(mixture_terms(a, b, m, 1 - skew)) if q.flat else None
    slope = torch.div(a, m, out=second).log_().mul_(q.probs)
    value = q.sum(slope) if value is None else value
    slope.add_(torch.sub(p.probs, q.probs, out=first).mul_(q.probs).div_(m), alpha=skew * (1 - skew))
    return value, slope, q.sum(slope)


def total_variation(q: Side, p: Side, new: New) -> tuple[Tensor, Tensor, Tensor]:
    """Half the sum of |q - p|; slope q sign(q-p) / 2."""
    gap = torch.sub(q.probs, p.probs, out=new())
    out = new()
    value = q.sum(torch.abs(gap, out=out)) / 2
    slope = torch.sign(gap, out=out).mul_(q.probs).mul_(0.5)
    return value, slope, q.sum(slope)


def hard_labels(q: Side, p: Side, new: New) -> tuple[Tensor, Tensor, None]:
    """-log q at the teacher's most probable class; slope q - 1 there and q elsewhere, of sum 0."""
    if q.shard is not None:
        raise ValueError("hard_labels needs the whole vocabulary in one process; take forward_kl")
    label = p.bits.argmax(-1, keepdim=True)
    value = q.log_total - q.bits.gather(-1, label).to(q.log_total.dtype) * LN2 + _nan(q, p)
    out = new()
    slope = q.probs.clone() if out is None else out.copy_(q.probs)
    return value, slope.scatter_add_(-1, label, slope.new_full(label.shape, -1)), None


def _kl(a: Side, b: Side) -> Tensor:
    """KL(a || b) with all its digits, in memory of its own."""
    return a.sum(kl_terms(a.probs, b.probs, a.log_probs(), b.log_probs()))
