"""Kullback-Leibler divergence of multi-label heads."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import kl
from kdloss.engine import any_logits
from kdloss.reduction import alike


@any_logits(needs_logits=True, one_class=True)
def bernoulli_kl(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""KL(teacher || student) of one Bernoulli distribution per class, summed over classes, at every position.

    $T^2 \sum_v p_v \log\frac{p_v}{q_v} + (1-p_v) \log\frac{1-p_v}{1-q_v}$ with $p = \sigma(t/T)$ the
    teacher, $q = \sigma(s/T)$ the student. Nats. Unlike a softmax, it changes if a constant is added to the logits.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> bernoulli_kl(torch.tensor([0.0, 0.0]), torch.tensor([float("-inf"), 0.0]))  # log 2
    tensor(0.6931)

    Yang et al. 2023, "Multi-Label Knowledge Distillation", arXiv:2308.06453 (its logit part).
    """
    _checks.temperature(temperature)
    _checks.logits(student, teacher)
    student, teacher = alike(student, teacher.detach())
    values = kl(_both(teacher, temperature), _both(student, temperature)).sum(-1)
    return values * temperature**2 if t_squared else values


def _both(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of yes and no, in a last dimension."""
    x = logits / temperature
    return torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1)
