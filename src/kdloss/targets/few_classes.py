"""Bring a student and a top-k teacher to logits over the same classes."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss.reduction import alike, precise
from kdloss.targets.looks import free_to_look

if TYPE_CHECKING:
    from kdloss.targets.top_k import TopKLogits


def against(teacher: "TopKLogits", student: Float[Tensor, "*batch vocab"]) -> tuple[Tensor, Tensor]:
    """Logits of both over the same classes: the k kept ones, and the rest as `tail` treats it."""
    student, _ = alike(student, teacher.log_probs)
    vocab, t = student.shape[-1], teacher.temperature
    indices, empty = slots(teacher)
    nothing = says_nothing(empty)
    student = filled(student, nothing, 0.0)
    if teacher.tail == "uniform":
        return student, filled(spread(teacher, indices, vocab), nothing, 0.0).expand(student.shape)
    kept = filled(filled(student.gather(-1, indices), empty, -torch.inf), nothing, 0.0)
    if teacher.tail == "renormalise":
        return kept - base(kept), logits(teacher, empty, vocab)
    # Relative to the others' own largest: relative to the kept classes their mass may underflow.
    others = student.scatter(-1, indices, -torch.inf)
    largest = others.detach().amax(-1, keepdim=True)
    low, top = base(kept, largest), largest.masked_fill(largest == -torch.inf, 0)
    mass = ((others - top) / t).exp().sum(-1, keepdim=True)
    return torch.cat([kept - low, log_mass(mass) * t + (top - low)], -1), logits(teacher, empty, vocab)


def slots(teacher: "TopKLogits") -> tuple[Tensor, Tensor | None]:
    """Indices as int64, with a full slot's index in each empty slot, and which slots are empty.

    None stands for no empty slot; whether there is one is only tested where that needs no synchronisation.
    """
    indices = teacher.ids()
    if indices.numel() and free_to_look(indices) and indices.min().item() >= 0:
        return indices, None
    empty = indices < 0
    full = indices.amax(-1, keepdim=True).clamp_min(0)
    return indices.where(~empty, full), empty


def says_nothing(empty: Tensor | None) -> Tensor | None:
    """The rows `[..., 1]` whose slots are all empty."""
    return None if empty is None else empty.all(-1, keepdim=True)


def filled(x: Tensor, where: Tensor | None, number: float) -> Tensor:
    """A copy with a number in some places; None means nowhere."""
    return x if where is None else x.masked_fill(where, number)


def logits(teacher: "TopKLogits", empty: Tensor | None, vocab: int) -> Tensor:
    """The teacher's logits of the k classes, and of the bucket if the tail is one."""
    kept = filled(precise(teacher.log_probs), empty, -torch.inf)
    if teacher.tail == "bucket":
        rest = rest_of(teacher)
        if empty is not None:
            rest = rest.masked_fill((~empty).sum(-1) == vocab, -torch.inf)
        elif kept.shape[-1] == vocab:
            rest = torch.full_like(rest, -torch.inf)
        kept = torch.cat([kept, rest.unsqueeze(-1)], -1)
    return filled(kept * teacher.temperature, says_nothing(empty), 0.0)


def spread(teacher: "TopKLogits", indices: Tensor, vocab: int) -> Tensor:
    """The teacher's logits of all classes, with an equal share of the rest for each class that was left out."""
    log_probs, rest = alike(teacher.log_probs, rest_of(teacher))
    empty = teacher.ids() < 0
    left = (vocab - (~empty).sum(-1)).clamp_min(1).to(log_probs.dtype).log()
    repeated = log_probs.gather(-1, teacher.ids().argmax(-1, keepdim=True))
    shares = (rest - left).unsqueeze(-1).repeat_interleave(vocab, -1)
    return shares.scatter(-1, indices, log_probs.where(~empty, repeated)) * teacher.temperature


def rest_of(teacher: "TopKLogits") -> Tensor:
    """The log-probability of all that was left out; at least that of a rounding where it isn't stored."""
    if teacher.log_rest is not None:
        return precise(teacher.log_rest)
    log_probs = precise(teacher.log_probs).masked_fill(teacher.ids() < 0, -torch.inf)
    return (1 - log_probs.exp().sum(-1)).clamp_min(torch.finfo(log_probs.dtype).eps).log()


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), with -inf and no gradient where there is no mass."""
    none = mass == 0
    return mass.masked_fill(none, 1).log().masked_fill(none, -torch.inf)


def base(*logits: Tensor) -> Tensor:
    """The largest of some logits at every position, `[..., 1]`, 0 where none is finite.

    Logits are taken relative to it, so that small numbers are rounded, not large ones.
    """
    largest = torch.cat([x.detach().amax(-1, keepdim=True) for x in logits], -1).amax(-1, keepdim=True)
    return largest.masked_fill(largest == -torch.inf, 0)
