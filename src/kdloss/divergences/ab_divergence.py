"""The alpha-beta divergence of ABKD."""

from jaxtyping import Float
from torch import Tensor

from kdloss.divergences import _powers
from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits, power_forms


@any_logits(power_forms.ab_divergence)
def ab_divergence(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    alpha: float = 0.2,
    beta: float = 0.7,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Alpha-beta divergence at every position: `alpha=1, beta=0` is forward KL, `alpha=0, beta=1` reverse KL.

    $-\frac{T^2}{\alpha\beta} \sum_v \left(p_v^\alpha q_v^\beta - \frac{\alpha}{\alpha+\beta} p_v^{\alpha+\beta}
    - \frac{\beta}{\alpha+\beta} q_v^{\alpha+\beta}\right)$ with $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. A larger alpha gives more weight to classes where the student is far off, a
    larger beta to those where it is confident; the paper takes 0.2 and 0.7 for text, 0.9 and 0.2 for images. Where
    alpha, beta or their sum is 0 it is the limit, $\frac12 \sum_v \log^2 (q_v / p_v)$ where both are 0; near these
    limits it loses no digits. `alpha=beta=1` is half the squared Euclidean distance of the probabilities; with a sum
    of 1 it is the alpha-divergence. It is infinite where only one side excludes a class (probability 0) and the sum,
    or that side's power (beta where q is 0, alpha where p is 0), is not positive.

    Shapes: student and teacher logits `[..., V]`. `alpha` and `beta` are numbers whose sum is 0 or more. Returns
    `[...]`, in float32 or better. The teacher is detached. `t_squared=False` leaves out the factor T², which keeps the
    gradient's size as T changes if alpha + beta is 1.

    Raises: ValueError for a temperature that is not finite and positive, an alpha or beta that is not finite, a
    negative sum of the two, or shapes, vocabularies or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> ab_divergence(torch.tensor([0.0, float("-inf")]), torch.tensor([float("-inf"), 0.0]), alpha=1.0, beta=1.0)
    tensor(1.)

    Wang et al. 2025, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
    α-β-Divergence", arXiv:2505.04560; its limits in Cichocki, Cruces, Amari 2011, "Generalized Alpha-Beta Divergences
    and Their Application to Robust Nonnegative Matrix Factorization", doi:10.3390/e13010134.
    """
    power_forms.check(alpha, beta)
    values = _powers.ab(*log_probs(student, teacher, temperature), alpha, beta)
    return values * temperature**2 if t_squared else values
