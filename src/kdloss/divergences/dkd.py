"""Decoupled knowledge distillation."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import counted, kl, kl_of_others, label_or_not
from kdloss.engine import any_logits
from kdloss.reduction import fill


@any_logits()
def dkd(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    labels: Int64[Tensor, "*batch"],
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    ignore_index: int = -100,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""KL(teacher || student) in two terms at every position: label or not, and which of the other classes.

    $T^2 (\alpha\,\mathrm{KL}(b^p\,\|\,b^q) + \beta\,\mathrm{KL}(\hat p\,\|\,\hat q))$ with
    $b = (p_y, 1-p_y)$ for the label y and $\hat p$ the probabilities of all classes but y, renormalised;
    $p = \mathrm{softmax}(t/T)$ the teacher, $q = \mathrm{softmax}(s/T)$ the student. Nats. With
    $\beta = 1 - p_y$ and $\alpha = 1$ it would be forward KL. It is computed in log space; a label of
    `ignore_index` gives 0.

    Shapes: student and teacher logits `[..., V]`, labels `[...]` int64. Returns `[...]`, in float32 or
    better. The teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> dkd(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, float("-inf")]]), torch.tensor([2]), beta=1.0)
    tensor([0.4055])

    Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679.
    """
    _checks.weight("alpha", alpha)
    _checks.weight("beta", beta)
    _checks.temperature(temperature)
    student, teacher, labels, keep = counted(student, teacher, labels, ignore_index)
    values = torch.zeros_like(student[..., 0])
    if alpha > 0:  # a term of weight 0 may be infinite
        values = values + alpha * kl(*(label_or_not(x, labels, temperature) for x in (teacher, student)))
    if beta > 0:
        values = values + beta * kl_of_others(teacher, student, labels, temperature)
    values = fill(values, keep)
    return values * temperature**2 if t_squared else values
