"""Mean squared error of logits."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.engine import any_logits
from kdloss.reduction import alike


@any_logits(needs_logits=True, one_class=True)
def logit_mse(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Mean squared difference of the logits at every position.

    $\frac1V \sum_v (s_v - t_v)^2$. For centred logits, T² KL tends to half of this at high T. It changes if a
    constant is added to the logits. `temperature` has no effect, since the factor T² cancels the division by T; it is
    there so that all divergences are called alike. A class that both sides exclude with -inf is not counted.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached.

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> logit_mse(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor(2.)

    Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation", arXiv:2105.08919.
    """
    _checks.temperature(temperature)
    _checks.logits(student, teacher)
    s, t = alike(student, teacher.detach())
    excluded = (s == -torch.inf) & (t == -torch.inf)
    gap = s.masked_fill(excluded, 0) - t.masked_fill(excluded, 0)
    return gap.square().sum(-1) / (~excluded).sum(-1).clamp_min(1)
