r"""Values and slopes of divergences $\sum_v f(p_v, q_v)$ without autograd, in the rows they are given.

Each takes the student's side q and the teacher's p, may overwrite both, and returns the value of each row,
the slope $q\,\partial f/\partial q$, and the slope's sum over classes (None for 0). The gradient by the
student's logits is then (slope - q * sum) / T, for which q is left normalised where there is a sum.
The plain functions in `kdloss.divergences` are the specification.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine.side import Side
from kdloss.engine.terms import kl_terms, log_ratio, mixed, mixture_terms

ClosedForm = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def _nan(q: Side, p: Side) -> Tensor:
    """0 for rows of numbers: so that what 0 log 0 is made of hides no NaN among the logits."""
    return (q.log_total - p.log_total) * 0


def forward_kl(q: Side, p: Side) -> tuple[Tensor, Tensor, None]:
    """Sum of p log(p/q); slope q - p up to p's and q's sums of 1."""
    if q.flat:
        value = _kl(p, q)
    else:
        gap = torch.sub(p.x, q.x, out=p.x).mul_(p.e).nan_to_num_(0.0, posinf=torch.inf)
        value = p.sum(gap) / p.total + (q.log_total - p.log_total)
    return value, torch.sub(q.normalise(), p.normalise(), out=p.e), None


def reverse_kl(q: Side, p: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of q log(q/p); slope q log(q/p)."""
    exact = _kl(q, p) if q.flat else None
    slope = torch.sub(q.x, p.x, out=p.x).add_(q.log_ratio_to(p)).mul_(q.normalise())
    value = q.sum(slope.nan_to_num_(0.0, posinf=torch.inf)) + _nan(q, p)
    return value if exact is None else exact, slope, value


def symmetric_kl(q: Side, p: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of (q - p) log(q/p); slope q log(q/p) + q - p."""
    exact = _kl(p, q) + _kl(q, p) if q.flat else None
    log = torch.sub(q.x, p.x, out=q.x).add_(q.log_ratio_to(p))
    torch.mul(log, q.normalise(), out=p.x).nan_to_num_(0.0, posinf=torch.inf)
    reverse = q.sum(p.x) + _nan(q, p)
    forward = q.sum(log.mul_(p.normalise()).nan_to_num_(0.0, neginf=-torch.inf))
    slope = p.x.add_(torch.sub(q.e, p.e, out=p.e))
    return reverse - forward if exact is None else exact, slope, reverse


def jsd(q: Side, p: Side, *, beta: float = 0.5, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of beta p log(p/m) + (1-beta) q log(q/m); slope (1-beta) q log(q/m)."""
    _checks.fraction("beta", beta)
    if beta == 0:
        return forward_kl(q, p)
    if beta == 1:
        return reverse_kl(q, p)
    size = 1 / (beta * (1 - beta)) if normalize else 1.0
    q.smooth().normalise(), p.smooth().normalise()
    gap = torch.sub(p.x, q.x, out=p.x).add_(p.log_ratio_to(q))
    m = mixed(p.e, q.e, beta, out=q.x)  # equal to q where p is, to the last bit
    if q.flat or not 0.05 <= beta <= 0.95:  # small differences, multiplied by T² or 1/beta
        terms = beta * mixture_terms(p.e, q.e, m, 1 - beta) + (1 - beta) * mixture_terms(q.e, p.e, m, beta)
        value = q.sum(terms) * size
        slope = log_ratio(q.e, p.e, m, beta).mul_(q.e).mul_((1 - beta) * size)
        return value, slope, q.sum(slope)
    log = torch.div(q.e, m, out=m).log_()
    teacher = q.sum(gap.add_(log).mul_(p.e)) * (beta * size)
    slope = log.mul_(q.e).mul_((1 - beta) * size)
    student = q.sum(slope)
    return teacher + student, slope, student


def skewed_forward_kl(q: Side, p: Side, *, skew: float = 0.1) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of p log(p/m), m = skew p + (1-skew) q; slope (1-skew)^2 q (q-p) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return forward_kl(q, p)
    q.smooth().normalise(), p.smooth().normalise()
    m = mixed(p.e, q.e, skew, out=q.x)
    if q.flat:
        value = q.sum(mixture_terms(p.e, q.e, m, 1 - skew))
    else:
        value = q.sum(torch.div(p.e, m, out=p.x).log_().mul_(p.e))
    slope = torch.sub(q.e, p.e, out=p.e).mul_(q.e).div_(m).mul_((1 - skew) ** 2)
    return value, slope, q.sum(slope)


def skewed_reverse_kl(q: Side, p: Side, *, skew: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of q log(q/m), m = (1-skew) p + skew q; slope q log(q/m) + skew (1-skew) q (p-q) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return reverse_kl(q, p)
    q.smooth().normalise(), p.smooth().normalise()
    m = mixed(q.e, p.e, skew, out=q.x)
    slope = torch.div(q.e, m, out=p.x).log_().mul_(q.e)
    value = q.sum(mixture_terms(q.e, p.e, m, 1 - skew) if q.flat else slope)
    slope.add_(p.e.sub_(q.e).mul_(q.e).div_(m), alpha=skew * (1 - skew))
    return value, slope, q.sum(slope)


def total_variation(q: Side, p: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Half the sum of |q - p|; slope q sign(q-p) / 2."""
    gap = torch.sub(q.normalise(), p.normalise(), out=p.e)
    value = q.sum(torch.abs(gap, out=p.x)) / 2
    slope = torch.sign(gap, out=p.x).mul_(q.e).mul_(0.5)
    return value, slope, q.sum(slope)


def _kl(a: Side, b: Side) -> Tensor:
    """KL(a || b) with all its digits, in memory of its own."""
    p, q = a.e / a.total.to(a.e.dtype), b.e / b.total.to(b.e.dtype)
    log_p, log_q = a.x - a.log_total.to(a.x.dtype), b.x - b.log_total.to(b.x.dtype)
    return a.sum(kl_terms(p, q, log_p, log_q))
