"""Adaptive Kullback-Leibler divergence."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits
from kdloss.reduction import widest


@any_logits()
def adaptive_kl(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    head: float = 0.5,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""A weighted sum of forward and reverse KL at every position; the weights depend on where the two models differ.

    $\frac{g_h}{g_h + g_t}\mathrm{FKL} + \frac{g_t}{g_h + g_t}\mathrm{RKL}$, times T², with
    $g = \sum |p_v - q_v|$ over the teacher's head ($g_h$: its most probable classes up to a cumulative probability
    of `head`, always with the first one) and over its tail ($g_t$: the other classes);
    $p = \mathrm{softmax}(t/T)$ the teacher, $q = \mathrm{softmax}(s/T)$ the student.
    Nats. As in the authors' code, the weights have no gradient; where student and teacher are equal they are 1/2.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, a head outside 0 and 1, or
    shapes, vocabularies or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> adaptive_kl(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))  # tanh(1/2)
    tensor(0.4621)

    Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
    Models", arXiv:2404.02657.
    """
    _checks.fraction("head", head)
    log_q, log_p = log_probs(student, teacher, temperature)
    in_head, in_tail = _shares(student.detach(), teacher, temperature, head)
    values = _times(in_head.to(log_q.dtype), kl(log_p, log_q)) + _times(in_tail.to(log_q.dtype), kl(log_q, log_p))
    return values * temperature**2 if t_squared else values


def _shares(student: Tensor, teacher: Tensor, temperature: float, head: float) -> tuple[Tensor, Tensor]:
    """The share of the difference that is in the head, and the share that is in the tail.

    In float64: one minus a probability near 1 has few digits, and the divergence that it weighs may be large.
    """
    wide = widest(student.device)
    log_q, log_p = log_probs(student.to(wide), teacher.to(wide), temperature)
    p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    gap = (p - log_q.exp().gather(-1, order)).abs()
    inside = p.cumsum(-1) <= head
    inside[..., 0] = True
    total = gap.sum(-1)
    none = ~(total > 0)  # also where it is NaN, which the divergences keep
    total = total.masked_fill(none, 1)
    shares = ((gap * where).sum(-1) / total for where in (inside, ~inside))
    in_head, in_tail = (share.masked_fill(none, 0.5) for share in shares)
    return in_head, in_tail


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """The product, 0 where the weight is 0, also if the value is infinite."""
    return torch.where(weight > 0, weight * value.where(weight > 0, 0), 0)
