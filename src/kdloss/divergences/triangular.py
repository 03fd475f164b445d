"""Triangular discrimination."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits, power_forms


@any_logits(power_forms.triangular)
def triangular(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Triangular discrimination (Vincze, Le Cam) at every position: symmetric and never infinite.

    $T^2 \sum_v \frac{(p_v - q_v)^2}{p_v + q_v}$ with $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. It lies between 0 and 2 T², and near the teacher it is that of forward KL.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T², which keeps the gradient's size as T changes.

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> triangular(torch.tensor([0.0, float("-inf")]), torch.tensor([float("-inf"), 0.0]))
    tensor(2.)

    Topsøe 2000, "Some inequalities for information divergence and related measures of discrimination",
    doi:10.1109/18.850703.
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    none = (log_q == -torch.inf) & (log_p == -torch.inf)
    # (q - p) / (q + p) without cancellation
    t = (log_q - log_p.where(~none, 0)).where(~none, 0).div(2).tanh()
    values = ((log_q.exp() + log_p.exp()) * t.square()).sum(-1)
    return values * temperature**2 if t_squared else values
