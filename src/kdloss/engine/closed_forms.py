r"""Values and slopes of divergences $\sum_v f(p_v, q_v)$ without autograd, as pure functions.

Each takes the student's side q and the teacher's side p. It returns the value of each row `[r, 1]`, the slope
$q\,\partial f/\partial q$ `[r, V]` in memory that the caller may overwrite, and the slope's sum over classes (None for
0). The gradient by the student's logits is then (slope - q * sum) / T. The functions don't change q and p, since other
divergences read them too, and they don't branch on numbers, so that a compiler can fuse them into one loop.
The plain functions in `kdloss.divergences` are the specification.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine.once import once
from kdloss.engine.side import LN2, Side
from kdloss.engine.terms import log_ratio, mixed, mixture_terms

Form = tuple[Tensor, Tensor, Tensor | None]
ClosedForm = Callable[..., Form]


def nan(q: Side, p: Side) -> Tensor:
    """0 in each row, or NaN where the row's logits hold one, which the replacement of 0 log 0 by 0 would hide."""
    return (q.log_total - p.log_total) * 0


def forward_kl(q: Side, p: Side) -> Form:
    """Sum of p log(p/q); slope q - p, since p and q each sum to 1."""
    return p.kl(q), q.probs - p.probs, None


def reverse_kl(q: Side, p: Side) -> Form:
    """Sum of q log(q/p); slope q log(q/p)."""
    slope = q.log_ratio_to(p).mul_(q.probs).nan_to_num_(0.0, posinf=torch.inf)
    if q.pieced and not q.flat:  # saves one sweep
        value = q.kl(p)
        return value, slope, value
    total = q.sum(slope) + nan(q, p)
    return q.kl(p) if q.flat else total, slope, total


def symmetric_kl(q: Side, p: Side) -> Form:
    """Sum of (q - p) log(q/p); slope q log(q/p) + q - p."""
    reverse, slope, balance = reverse_kl(q, p)
    return p.kl(q) + reverse, slope.add_(q.probs - p.probs), balance


def jsd(q: Side, p: Side, *, beta: float = 0.5, normalize: bool = False) -> Form:
    """Sum of beta p log(p/m) + (1-beta) q log(q/m); slope (1-beta) q log(q/m)."""
    _checks.fraction("beta", beta)
    if beta == 0:
        return forward_kl(q, p)
    if beta == 1:
        return reverse_kl(q, p)
    size = 1 / (beta * (1 - beta)) if normalize else 1.0
    if q.flat or not 0.05 <= beta <= 0.95:  # small differences, multiplied by T² or 1/beta
        a, b = q.smooth(), p.smooth()
        m = mixed(b, a, beta)  # equal to q where p is, to the last bit
        terms = beta * mixture_terms(b, a, m, 1 - beta) + (1 - beta) * mixture_terms(a, b, m, beta)
        slope = log_ratio(a, b, m, beta).mul_(a).mul_((1 - beta) * size)
        return q.sum(terms) * size, slope, q.sum(slope)
    a, b = q.smooth(), p.smooth()
    m = mixed(b, a, beta)
    teacher = q.sum(b.div_(m).log_().mul_(p.probs)) * (beta * size)
    slope = a.div_(m).log_().mul_(q.probs).mul_((1 - beta) * size)
    student = q.sum(slope)
    return teacher + student, slope, student


def skewed_forward_kl(q: Side, p: Side, *, skew: float = 0.1) -> Form:
    """Sum of p log(p/m), m = skew p + (1-skew) q; slope (1-skew)^2 q (q-p) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return forward_kl(q, p)
    a, b = q.smooth(), p.smooth()
    m = mixed(b, a, skew)
    terms = mixture_terms(b, a, m, 1 - skew) if q.flat else (b / m).log_().mul_(p.probs)
    slope = (q.probs - p.probs).mul_(q.probs).div_(m).mul_((1 - skew) ** 2)
    return q.sum(terms), slope, q.sum(slope)


def skewed_reverse_kl(q: Side, p: Side, *, skew: float = 0.1) -> Form:
    """Sum of q log(q/m), m = (1-skew) p + skew q; slope q log(q/m) + skew (1-skew) q (p-q) / m."""
    _checks.fraction("skew", skew)
    if skew == 0:
        return reverse_kl(q, p)
    a, b = q.smooth(), p.smooth()
    m = mixed(a, b, skew)
    slope = (a / m).log_().mul_(q.probs)
    value = q.sum(mixture_terms(a, b, m, 1 - skew)) if q.flat else q.sum(slope)
    slope.add_((p.probs - q.probs).mul_(q.probs).div_(m), alpha=skew * (1 - skew))
    return value, slope, q.sum(slope)


def total_variation(q: Side, p: Side) -> Form:
    """Half the sum of |q - p|; slope q where q > p, 0 elsewhere.

    That is q sign(q-p) / 2 plus q / 2, and q / 2 together with its sum adds nothing to the gradient.
    """
    gap = q.probs - p.probs
    if q.pieced:  # compare logarithms, so that the gradient's sweep needs no exponentials of the teacher
        level = p.bits + once(((q.log_total - p.log_total) / LN2).to(gap.dtype))
        slope = torch.where(q.bits > level, q.probs, 0)
    else:
        slope = torch.ops.aten.threshold_backward(q.probs, gap, 0.0)  # the same, thirty times faster
    value = q.sum(gap.abs_()) / 2
    return value, slope, torch.add(q.sum(slope), value, alpha=0)  # keeps the value's NaN


def hard_labels(q: Side, p: Side) -> Form:
    """-log q at the teacher's most probable class; slope q - 1 there and q elsewhere, of sum 0."""
    if q.shard is not None:
        raise ValueError("hard_labels needs the whole vocabulary in one process; take forward_kl")
    label = p.bits.argmax(-1, keepdim=True)
    value = q.log_total - q.bits.gather(-1, label).to(q.log_total.dtype) * LN2 + nan(q, p)
    slope = q.probs.clone()
    return value, slope.scatter_add_(-1, label, slope.new_full(label.shape, -1)), None


WITHOUT_SCRATCH = {forward_kl, reverse_kl, symmetric_kl, skewed_forward_kl, total_variation}
"""Forms that torch.compile, from torch 2.6 on, computes in sweeps over the logits, without scratch as large."""
