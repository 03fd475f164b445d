"""Normalised knowledge distillation."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import counted, kl_of_others, log_probs
from kdloss.engine import any_logits
from kdloss.reduction import fill


@any_logits()
def nkd(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    labels: Int64[Tensor, "*batch"],
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    ignore_index: int = -100,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""The label weighted by the teacher's probability of it, plus KL of the other classes, at every position.

    $-p_y \log q_y + \gamma T^2\,\mathrm{KL}(\hat p\,\|\,\hat q)$ with the label y, the teacher's p and the student's q
    at T = 1 in the first term, and $\hat p$, $\hat q$ the probabilities at T of all classes but y, renormalised. Nats.
    The first term is the paper's cross-entropy: where student and teacher are equal, neither it nor its gradient is 0.
    The second is the paper's minus the teacher's entropy, which is constant. A label of `ignore_index` gives 0.

    Shapes: student and teacher logits `[..., V]`, labels `[...]` int64. Returns `[...]`, in float32 or
    better. The teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> nkd(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))  # log(2) / 2
    tensor([0.3466])

    Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", arXiv:2303.13005.
    """
    _checks.weight("gamma", gamma)
    _checks.temperature(temperature)
    student, teacher, labels, keep = counted(student, teacher, labels, ignore_index)
    label = [x.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for x in log_probs(student, teacher, 1.0)]
    p = label[1].exp()
    soft_label = torch.where(p > 0, -p * label[0], 0)
    if gamma > 0:  # a term of weight 0 may be infinite
        size = gamma * (temperature**2 if t_squared else 1.0)
        soft_label = soft_label + size * kl_of_others(teacher, student, labels, temperature)
    return fill(soft_label, keep)
