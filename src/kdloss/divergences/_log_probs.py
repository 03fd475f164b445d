"""Both sides of a divergence in log space."""

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine.terms import kl_terms
from kdloss.reduction import alike, fill, precise


def log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Checked log-probabilities of student and detached teacher at a temperature."""
    _checks.temperature(temperature)
    _checks.logits(student, teacher)
    student, teacher = alike(student, teacher.detach())
    return log_softmax(student, temperature), log_softmax(teacher, temperature)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in float32 or better."""
    logits = precise(logits)
    if temperature != 1:
        # The maximum leaves before the division, which then rounds small numbers, not large ones.
        logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return logits.log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), without cancellation between large terms."""
    return kl_terms(log_a.exp(), log_b.exp(), log_a, log_b).sum(-1)


def counted(student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """Student, teacher and labels with zeros where a label is ignored, and where one is not."""
    _checks.logits(student, teacher)
    _checks.labels(labels, student)
    keep = labels != ignore_index
    return fill(student, keep), fill(teacher, keep), fill(labels, keep), keep


def label_or_not(log_p: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the label and of all other classes together, `[..., 2]`."""
    others, none = _others(log_p, labels)
    rest = others.logsumexp(-1, keepdim=True).masked_fill(none, -torch.inf)
    return torch.cat([log_p.gather(-1, labels.unsqueeze(-1)), rest], -1)


def kl_of_others(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """KL of the classes but the label among themselves; 0 where one side gives them nothing."""
    (p, none_p), (q, none_q) = _others(log_p, labels), _others(log_q, labels)
    return kl(p.log_softmax(-1), q.log_softmax(-1)).masked_fill((none_p | none_q).squeeze(-1), 0)


def _others(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label at -inf (all at 0 where nothing would be left), and where nothing is left."""
    others = log_p.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    none = (others == -torch.inf).all(-1, keepdim=True)
    return others.masked_fill(none, 0), none
