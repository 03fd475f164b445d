"""Jeffreys divergence."""

from jaxtyping import Float
from torch import Tensor

from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits, closed_forms


@any_logits(closed_forms.symmetric_kl)
def symmetric_kl(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""KL(teacher || student) + KL(student || teacher) at every position.

    $T^2 \sum_v (p_v - q_v) \log \frac{p_v}{q_v}$ with $p = \mathrm{softmax}(t/T)$ the teacher, $q =
    \mathrm{softmax}(s/T)$ the student.
    Nats; infinite where only one side excludes a class (probability 0).

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> symmetric_kl(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))  # 2 tanh(1/2)
    tensor(0.9242)

    Jeffreys 1946, "An invariant form for the prior probability in estimation problems".
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    values = kl(log_p, log_q) + kl(log_q, log_p)
    return values * temperature**2 if t_squared else values
