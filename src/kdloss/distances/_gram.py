"""Gram matrices."""

from typing import Any

import torch
from torch import Tensor

from kdloss.distances._rows import product


def gram(x: Tensor) -> Tensor:
    """The Gram matrix of rows `[..., N, D]`. Its gradient takes one matrix product; that of `x @ x.mT` takes two."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return product(x, x)
    found: Tensor = _Gram.apply(x)  # type: ignore[no-untyped-call]
    return found


class _Gram(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return product(x, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return product(upstream + upstream.mT, x.mT)
