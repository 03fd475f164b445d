"""Amari's alpha-divergence."""

from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences import _powers
from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits, power_forms


@any_logits(power_forms.alpha_divergence)
def alpha_divergence(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Alpha-divergence at every position: from reverse KL (`alpha=0`) to forward KL (`alpha=1`) and beyond.

    $T^2 \frac{1 - \sum_v p_v^\alpha q_v^{1-\alpha}}{\alpha (1-\alpha)}$ with $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. In Amari's own notation $\alpha_A = 2\alpha - 1$, up to the order of the
    two. At 0 and 1 it is exactly these KLs, and near them it loses no digits; at 1/2 it is four times the squared
    Hellinger distance, at 2 half of Pearson's chi-square. Nats. Strictly between 0 and 1 it is never infinite. For
    alpha of 1 or more a class with q = 0 < p makes it infinite, for alpha of 0 or less one with p = 0 < q.

    Shapes: student and teacher logits `[..., V]`. `alpha` is any number. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T², which keeps the gradient's size as T changes.

    Raises: ValueError for a temperature that is not finite and positive, an alpha that is not finite, or shapes,
    vocabularies or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> alpha_divergence(torch.tensor([0.0, float("-inf")]), torch.tensor([float("-inf"), 0.0]))  # 1 / (1/2)²
    tensor(4.)

    Cichocki, Amari 2010, "Families of Alpha- Beta- and Gamma-Divergences: Flexible and Robust Measures of
    Similarities", doi:10.3390/e12061532.
    """
    _checks.number("alpha", alpha)
    values = _powers.ab(*log_probs(student, teacher, temperature), alpha, 1 - alpha)
    return values * temperature**2 if t_squared else values
