"""Both sides of a divergence in log space."""

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine.terms import kl_terms
from kdloss.reduction import alike, fill, precise


def log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Check student and teacher, and return the log-probabilities of both at a temperature, the teacher's detached."""
    _checks.temperature(temperature)
    _checks.logits(student, teacher)
    student, teacher = alike(student, teacher.detach())
    return log_softmax(student, temperature), log_softmax(teacher, temperature)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32 or better."""
    logits = precise(logits)
    if temperature != 1:
        # The maximum is subtracted before the division, which then rounds small numbers, not large ones.
        logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return logits.log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), without cancellation between large terms."""
    return kl_terms(log_a.exp(), log_b.exp(), log_b - log_a).sum(-1)


def counted(student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """Student, detached teacher and labels, with zeros where a label is ignored, and the mask of the others."""
    _checks.logits(student, teacher)
    _checks.labels(labels, student)
    keep = labels != ignore_index
    student, teacher = alike(student, teacher.detach())
    return fill(student, keep), fill(teacher, keep), fill(labels, keep), keep


def label_or_not(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the label and of all other classes together, `[..., 2]`."""
    others, none = _others(logits, labels)
    mine = logits.gather(-1, labels.unsqueeze(-1))
    # Relative to the others' own largest: relative to a much larger label they would lose their digits.
    top = others.detach().amax(-1, keepdim=True)
    size = ((others - top) / temperature).logsumexp(-1, keepdim=True)
    base = torch.maximum(mine.detach(), top.masked_fill(none, -torch.inf))
    base = base.masked_fill(base == -torch.inf, 0)
    rest = (size + (top - base) / temperature).masked_fill(none, -torch.inf)
    return torch.cat([(mine - base) / temperature, rest], -1).log_softmax(-1)


def kl_of_others(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL of all classes but the label, renormalised; 0 where one side gives them no probability."""
    (t, none_t), (s, none_s) = _others(teacher, labels), _others(student, labels)
    values = kl(log_softmax(t, temperature), log_softmax(s, temperature))
    return values.masked_fill((none_t | none_s).squeeze(-1), 0)


def _others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with the label at -inf, and where no other class has mass; there all are 0."""
    others = logits.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    none = (others == -torch.inf).all(-1, keepdim=True)
    return others.masked_fill(none, 0), none
