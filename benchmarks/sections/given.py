"""Inputs of a loss: logits, or hidden states and heads."""

from typing import Any

import torch
from measure import leaves
from torch import Tensor

import kdloss


def logits(tokens: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels."""
    student, teacher = (torch.randn(tokens, vocab).mul_(3).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, vocab, (tokens,))


def lazy(
    tokens: int, vocab: int, width: int, teacher_width: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Tensor]:
    """The same as hidden states and heads."""
    sides = []
    for size in (width, teacher_width):
        hidden, weight = torch.randn(tokens, size), torch.randn(vocab, size) / size**0.5
        sides.append(kdloss.LazyLogits(hidden.to(dtype), weight.to(dtype)))
    for tensor in leaves(sides[:1]):
        tensor.requires_grad_()
    return sides[0], sides[1], torch.randint(0, vocab, (tokens,))


def shape(*sizes: int) -> str:
    """Format sizes, for example as 8 × 128 000."""
    return " × ".join(f"{size:,}".replace(",", " ") for size in sizes)


def short(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
