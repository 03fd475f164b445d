"""Hard distillation: the teacher's decision as a label."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits, closed_forms


@any_logits(closed_forms.hard_labels, needs_classes=True)
def hard_labels(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy with the teacher's most probable class as the label, at every position.

    $-T^2 \log q_y$ with $y = \arg\max_v t_v$ the teacher's decision, the first of equal ones, and
    $q = \mathrm{softmax}(s/T)$ the student; the paper has T = 1. Nats, never negative. It is no divergence in the
    strict sense: where student and teacher are equal, it is not 0 and its gradient pushes the student towards
    certainty. It is infinite where q = 0 for the class that the teacher decides for.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. `t_squared=False`
    leaves out the factor T². A top-k teacher needs `tail="uniform"`, since a bucket is no class.

    Raises: ValueError for a temperature that is not finite and positive, or shapes, vocabularies
    or devices that differ; TypeError for integer logits.

    >>> import torch
    >>> hard_labels(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))  # log 2
    tensor(0.6931)

    Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention",
    arXiv:2012.12877.
    """
    log_q, log_p = log_probs(student, teacher, temperature)
    label = teacher.argmax(-1, keepdim=True)
    nan = torch.where(log_p.gather(-1, label).isnan(), torch.nan, 0.0)  # argmax hides NaN
    values = (nan - log_q.gather(-1, label)).squeeze(-1)
    return values * temperature**2 if t_squared else values
