"""Generalised Jensen-Shannon divergence."""

from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences import _mixtures
from kdloss.divergences._log_probs import kl, log_probs
from kdloss.engine import any_logits, closed_forms


@any_logits(closed_forms.jsd)
def jsd(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    normalize: bool = False,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Generalised Jensen-Shannon divergence at every position: between forward and reverse KL, never infinite.

    $T^2 (\beta\,\mathrm{KL}(p\,\|\,m) + (1-\beta)\,\mathrm{KL}(q\,\|\,m))$ with
    $m = \beta p + (1-\beta) q$, $p = \mathrm{softmax}(t/T)$ the teacher, $q = \mathrm{softmax}(s/T)$
    the student. Nats. `beta=0` is forward and `beta=1` reverse KL, as in GKD. Near 0 and 1 the value of the formula
    shrinks with $\beta(1-\beta)$; `normalize=True` divides by that, so that its limits are these KLs.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The
    teacher is detached. `t_squared=False` leaves out the factor T².

    Raises: ValueError for a temperature that is not finite and positive, a beta outside 0 and 1, or
    shapes, vocabularies or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> jsd(torch.tensor([0.0, float("-inf")]), torch.tensor([float("-inf"), 0.0]))  # log 2
    tensor(0.6931)

    Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", arXiv:2306.13649.
    """
    _checks.fraction("beta", beta)
    log_q, log_p = log_probs(student, teacher, temperature)
    if beta in (0, 1):
        values = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    else:
        values = _mixtures.jsd(log_q, log_p, beta)
        values = values / (beta * (1 - beta)) if normalize else values
    return values * temperature**2 if t_squared else values
