"""Feature distances in plain PyTorch, written in the obvious way; each returns the loss of a batch as a number.

Token features are `[..., N, D]`, maps `[B, C, H, W]`. Distances that relate examples take one vector each, `[B, D]`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXACT = "donot_use_mm_for_euclid_dist"


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, teacher)


def layer_norm_mse(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
    return F.mse_loss(s, t)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher).square().mean(-1) / teacher.square().mean(-1)).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return (s - t).square().sum(-1).mean()


def activation_boundary(student: Tensor, teacher: Tensor) -> Tensor:
    """The authors' code with a mean in place of a sum."""
    on = (teacher > 0).float()
    return ((student + 1).relu().square() * (1 - on) + (1 - student).relu().square() * on).mean()


def standardized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    variance = teacher.flatten(0, -2).var(0, correction=0)
    return ((student - teacher).square() / (variance + 1e-5)).mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Takes maps."""
    s, t = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    return F.mse_loss(s, t)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Takes maps; by products over positions, which is cheaper if there are more channels than positions."""
    s, t = (F.normalize(x.flatten(2), dim=-1) for x in (student, teacher))
    gap = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
    return gap.square().sum((1, 2)).mean()


def fsp(student: Tensor, teacher: Tensor) -> Tensor:
    """Takes the maps of two layers, concatenated."""
    flows = []
    for x in (student, teacher):
        first, second = x.flatten(2).chunk(2, 1)
        flows.append(first @ second.mT / first.shape[-1])
    return (flows[0] - flows[1]).square().sum((1, 2)).mean()


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Takes maps."""
    s, t = (x.flatten(2) / temperature for x in (student, teacher))
    total = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum")
    return total * temperature**2 / s.shape[:2].numel()


def cwd_of_rows(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    s, t = (x / temperature for x in (student, teacher))
    total = F.kl_div(s.log_softmax(-2), t.softmax(-2), reduction="sum")
    return total * temperature**2 / (s.shape[0] * s.shape[-1])


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (F.normalize(x @ x.mT, dim=-1) for x in (student, teacher))
    return F.mse_loss(s, t)


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """By Gram matrices, which is cheaper if D is larger than N."""
    s, t = (x - x.mean(-2, keepdim=True) for x in (student, teacher))
    k, g = s @ s.mT, t @ t.mT
    return 1 - ((k * g).sum((-2, -1)) / (k.norm(dim=(-2, -1)) * g.norm(dim=(-2, -1)))).mean()


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    kernels = []
    for x in (student, teacher):
        unit = F.normalize(x, dim=-1)
        cosines = unit @ unit.mT
        kernels.append(sum((2 * gamma * cosines) ** p / (1 + (p > 1)) for p in range(3)))
    return F.mse_loss(*kernels) * torch.exp(torch.tensor(-4 * gamma))


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    q, p = ((F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT + 1) / 2 for x in (student, teacher))
    q, p = (x / x.sum(-1, keepdim=True) for x in (q, p))
    return (p * ((p + eps) / (q + eps)).log()).mean()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """With exact distances: `torch.cdist` by products loses the digits of near duplicates."""
    s, t = (torch.cdist(x, x, compute_mode=EXACT) for x in (student, teacher))
    others = 1 - 1 / s.shape[-1]
    s, t = (x / (x.mean((-2, -1), keepdim=True) / others) for x in (s, t))
    return F.smooth_l1_loss(s, t)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    angles = []
    for x in (student, teacher):
        arms = F.normalize(x.unsqueeze(-3) - x.unsqueeze(-2), dim=-1)
        angles.append(arms @ arms.mT)
    return F.smooth_l1_loss(*angles)


def word_relation(student: Tensor, teacher: Tensor, window: int = 21) -> Tensor:
    """The authors' code: windows reach beyond the sentence, padded with its first and last words."""
    cosines, angles = [], []
    for x in (student, teacher):
        unit = F.normalize(x, dim=-1)
        itself = torch.eye(x.shape[1], dtype=torch.bool)
        cosines.append((unit @ unit.mT).masked_fill(itself, -torch.inf))
        padded = F.pad(x.mT, (window // 2, window // 2), mode="replicate")
        arms = F.normalize(padded.unfold(2, window, 1).permute(0, 2, 3, 1) - x.unsqueeze(2), dim=-1)
        angles.append(arms @ arms.mT)
    pairs = F.kl_div(cosines[0].log_softmax(-1).clamp_min(-1e4), cosines[1].softmax(-1), reduction="sum")
    return pairs / cosines[0].numel() + F.mse_loss(*angles)


def crd(student: Tensor, teacher: Tensor, heads: list[nn.Linear], memories: list[Tensor], at: int = 0) -> Tensor:
    """With two heads, memories of students and teachers, and the index to write next."""
    s, t = (F.normalize(head(x), dim=-1) for head, x in zip(heads, (student, teacher), strict=True))
    students, teachers = (memory.clone() for memory in memories)
    bar = math.log(len(students)) + 1 / (2 * s.shape[-1] * 0.07**2)
    far = F.softplus(s @ teachers.T / 0.07 - bar).sum(-1) + F.softplus(t @ students.T / 0.07 - bar).sum(-1)
    for memory, new in zip(memories, (s, t), strict=True):
        memory[at : at + len(s)] = new.detach()
    return (2 * F.softplus(bar - (s * t).sum(-1) / 0.07) + far).mean()
