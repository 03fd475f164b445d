"""Rényi divergence."""

from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences import _powers
from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits, power_forms


@any_logits(power_forms.renyi)
def renyi(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    order: float = 0.5,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Rényi divergence of the student from the teacher at every position; `order=1` is forward KL.

    $T^2 \frac{1}{\alpha - 1} \log \sum_v p_v^\alpha q_v^{1-\alpha}$ with $\alpha$ = `order`,
    $p = \mathrm{softmax}(t/T)$ the teacher, $q = \mathrm{softmax}(s/T)$ the student. Nats. It grows with the order, and
    it loses no digits near order 1. Below order 1 it is infinite only if no class has mass on both sides; from 1 on
    any class with q = 0 < p makes it infinite.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T², which keeps the gradient's size (times the order)
    as T changes.

    Raises: ValueError for a temperature or an order that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> renyi(torch.tensor([0.0, 0.0]), torch.tensor([0.0, float("-inf")]), order=2.0)  # log 2
    tensor(0.6931)

    Rényi 1961, "On measures of entropy and information"; van Erven, Harremoës 2014, "Rényi Divergence and
    Kullback-Leibler Divergence", arXiv:1206.2459.
    """
    _checks.positive("order", order)
    log_q, log_p = log_probs(student, teacher, temperature)
    values = kl(log_p, log_q) if order == 1 else _powers.renyi(log_q, log_p, order)
    return values * temperature**2 if t_squared else values
