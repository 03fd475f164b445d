"""Reverse Kullback-Leibler divergence, KL(student || teacher)."""

from jaxtyping import Float
from torch import Tensor

from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits, closed_forms


@any_logits(closed_forms.reverse_kl)
def reverse_kl(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""KL(student || teacher) at every position: the student may concentrate on some of the teacher's modes.

    $T^2 \sum_v q_v \log \frac{q_v}{p_v}$ with $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. Nats, never negative, 0 exactly at the teacher. A
    class with q = 0 adds nothing; one with p = 0 < q makes it infinite.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> reverse_kl(torch.tensor([0.0, float("-inf")]), torch.tensor([0.0, 0.0]))  # log 2
    tensor(0.6931)

    Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models",
    arXiv:2306.08543.
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    values = kl(log_q, log_p)
    return values * temperature**2 if t_squared else values
