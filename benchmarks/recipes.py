"""Losses in plain PyTorch, as training scripts write them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

T = 2.0


def kl(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    p = (teacher / T).softmax(-1)
    return F.kl_div((student / T).log_softmax(-1), p, reduction="batchmean") * T**2


def kl_ce(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * kl(student, teacher)


def kl_ce_kept(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The same with labels of -100: compute all values, then apply a mask."""
    p = (teacher / T).softmax(-1)
    values = F.kl_div((student / T).log_softmax(-1), p, reduction="none").sum(-1)
    keep = labels != -100
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * T**2 * (values * keep).sum() / keep.sum()


def jsd(student: Tensor, teacher: Tensor, labels: Tensor | None = None, beta: float = 0.5) -> Tensor:
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_p + math.log(beta), log_q + math.log1p(-beta)]), 0)
    to_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return T**2 * (beta * to_teacher + (1 - beta) * to_student)


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    q = (student / T).softmax(-1)
    return F.kl_div((teacher / T).log_softmax(-1), q, reduction="batchmean") * T**2


def total_variation(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    return 0.5 * ((student / T).softmax(-1) - (teacher / T).softmax(-1)).abs().sum(-1).mean()


def truncated(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The teacher has more classes than the student."""
    shared = student.shape[-1]
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * kl(student, teacher[..., :shared])


def mapped(student: Tensor, teacher: Tensor, labels: Tensor, student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Select the classes that both models have, by their ids."""
    hard = F.cross_entropy(student, labels)
    return 0.5 * hard + 0.5 * kl(student.index_select(-1, student_ids), teacher.index_select(-1, teacher_ids))


def gathered(student: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """KL of stored top-k log-probabilities. The other classes are left out, so it can be negative."""
    log_q = student.log_softmax(-1).gather(-1, indices)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1).mean()


# DistillKit's formulas in our own code: log-softmax of both sides, then everything from the logarithms.


def logs_kl(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    return T**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def logs_jsd(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).clamp_min(1e-30).log()
    return T**2 * 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)).mean()


def logs_total_variation(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()


def sparse(student: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """The same as `gathered`, with a logsumexp in place of the log-softmax."""
    log_q = student.gather(-1, indices) - student.logsumexp(-1, keepdim=True)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1).mean()
