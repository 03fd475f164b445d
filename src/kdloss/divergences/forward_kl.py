"""Forward Kullback-Leibler divergence, KL(teacher || student)."""

from jaxtyping import Float
from torch import Tensor

from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits, closed_forms


@any_logits(closed_forms.forward_kl)
def forward_kl(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""KL(teacher || student) at every position: the student must give mass to every class that the teacher does.

    $T^2 \sum_v p_v \log \frac{p_v}{q_v}$ with $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. Nats, never negative, 0 exactly at the teacher. A
    class with p = 0 adds nothing; one with q = 0 < p makes it infinite.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T², which keeps the gradient's
    size as T changes.

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> forward_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, float("-inf")]))  # log 2
    tensor(0.6931)

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    values = kl(log_p, log_q)
    return values * temperature**2 if t_squared else values
