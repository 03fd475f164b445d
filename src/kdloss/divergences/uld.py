"""Universal logit distillation."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import log_softmax
from kdloss.engine import any_logits
from kdloss.reduction import alike


@any_logits(any_vocabulary=True)
def uld(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch other_vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""L1 distance of the sorted probabilities at every position, for vocabularies that have nothing in common.

    $\sum_i |p_{(i)} - q_{(i)}|$ with the probabilities in descending order, the shorter list padded with
    zeros; $p = \mathrm{softmax}(t/T)$ the teacher, $q = \mathrm{softmax}(s/T)$ the student. Between 0
    and 2. No factor T². It ignores which class has which probability, so it can be 0 where the two models differ.

    Shapes: student logits `[..., V]`, teacher logits `[..., W]`, both tensors. Returns `[...]`, in float32
    or better. The teacher is detached.

    Raises: ValueError for a temperature that is not finite and positive, positions or devices that
    differ, or a top-k teacher; TypeError for integer logits.

    >>> import torch
    >>> uld(torch.zeros(2), torch.zeros(4))
    tensor(1.)

    Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
    LLMs", arXiv:2402.12030.
    """
    _checks.temperature(temperature)
    _checks.floating("student logits", student)
    _checks.floating("teacher logits", teacher)
    _checks.logit_shapes(student.shape, teacher.shape, None if teacher.shape[-1:].numel() else 0)
    _checks.same_place("teacher logits", student, teacher)
    student, teacher = alike(student, teacher.detach())
    q = log_softmax(student, temperature).exp().sort(-1, descending=True).values
    p = log_softmax(teacher, temperature).exp().sort(-1, descending=True).values
    longest = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(x, (0, longest - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)
