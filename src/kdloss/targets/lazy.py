"""Logits given by hidden states and head: the full logits never have to exist."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Size, Tensor

from kdloss import _checks


@dataclass(frozen=True, eq=False)
class LazyLogits:
    r"""Logits given by hidden states and the head's weight; they are computed in blocks where they are needed.

    $z = c \tanh\frac{\sigma (h W^\top + b)}{c}$ with $\sigma$ = `scale` and c = `softcap`; without
    a `softcap` $z = \sigma (h W^\top + b)$. Gradients reach hidden, weight and bias.

    Shapes: hidden `[..., D]`, weight `[V, D]`, bias `[V]`; stands for logits `[..., V]`.

    Raises: ValueError for shapes or devices that don't fit; TypeError for integers.

    >>> import kdloss
    >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(50, 8)
    >>> student = LazyLogits(hidden, weight)
    >>> student.shape, kdloss.divergences.forward_kl(student, student.dense())
    (torch.Size([2, 50]), tensor([0., 0.], grad_fn=<...>))

    Soft-capping: Gemma Team 2024, "Gemma 2", arXiv:2408.00118.
    """

    hidden: Float[Tensor, "*batch width"]
    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.floating("hidden", self.hidden)
        _checks.floating("weight", self.weight)
        if self.weight.ndim != 2 or self.hidden.ndim == 0 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden {tuple(self.hidden.shape)} and weight {tuple(self.weight.shape)} don't fit; "
                "they are [..., D] and [V, D], as in nn.Linear"
            )
        _checks.same_place("weight", self.hidden, self.weight)
        if self.softcap is not None and not 0 < self.softcap < torch.inf:
            raise ValueError(f"softcap must be finite and above 0, or None for no cap, got {self.softcap!r}")
        if self.bias is not None:
            _checks.floating("bias", self.bias)
            _checks.same_place("bias", self.hidden, self.bias)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(
                    f"bias has shape {tuple(self.bias.shape)}, weight {tuple(self.weight.shape)} "
                    f"needs {tuple(self.weight.shape[:1])}"
                )

    @property
    def shape(self) -> Size:
        """The shape of the logits."""
        return Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.hidden.device

    def dense(self) -> Float[Tensor, "*batch vocab"]:
        """All logits as a tensor."""
        dtype = self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.shaped(F.linear(self.hidden, self.weight.to(dtype), bias))

    def shaped(self, z: Tensor) -> Tensor:
        """Scale and soft-cap the head's output."""
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap is None else (z / self.softcap).tanh() * self.softcap

    def at(self, pick: Callable[[Tensor], Tensor]) -> "LazyLogits":
        """The same head at chosen positions."""
        return self.with_hidden(pick(self.hidden))

    def with_hidden(self, hidden: Float[Tensor, "*batch width"]) -> "LazyLogits":
        """The same head for other hidden states."""
        return LazyLogits(hidden, self.weight, self.bias, self.softcap, self.scale)

    def classes(self, ids: "Tensor | slice") -> "LazyLogits":
        """The logits of some entries of the vocabulary."""
        bias = None if self.bias is None else self.bias[ids]
        return LazyLogits(self.hidden, self.weight[ids], bias, self.softcap, self.scale)

    def detach(self) -> "LazyLogits":
        """The same logits, detached."""
        bias = None if self.bias is None else self.bias.detach()
        return LazyLogits(self.hidden.detach(), self.weight.detach(), bias, self.softcap, self.scale)
