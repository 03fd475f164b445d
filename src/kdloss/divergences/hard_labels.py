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

    $-T^2 \log q_y$ with $y = \arg\max_v t_v$ the teacher's decision, the first of equals, and
    $q = \mathrm{softmax}(s/T)$ the student; the paper's has T = 1. Nats, never negative. No divergence in the strict
    sense: at the teacher it is neither 0 nor without gradient, but pulls the student on towards
    certainty. A class with q = 0 that the teacher decides for makes it infinite.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. `t_squared=False`
    leaves out the factor T². Of top-k teachers only those with `tail="uniform"`: a bucket is no class.

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
    nan = torch.where(log_p.gather(-1, label).isnan(), torch.nan, 0.0)  # an argmax has none
    values = (nan - log_q.gather(-1, label)).squeeze(-1)
    return values * temperature**2 if t_squared else values
