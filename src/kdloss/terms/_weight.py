"""The weight of a term in a sum."""

import math
from typing import Any

from torch import Tensor, nn

from kdloss import _checks
from kdloss.weighting import Weighting

Factor = Any


class Weight(nn.Module):
    """A product of numbers, functions of the step, tensors (parameters are trained) and at most one weighting."""

    def __init__(self, *factors: Factor) -> None:
        super().__init__()
        by_teacher = [f for f in factors if isinstance(f, Weighting)]
        factors = tuple(f for f in factors if not isinstance(f, Weighting))
        if modules := [type(f).__name__ for f in factors if isinstance(f, nn.Module)]:
            raise TypeError(
                f"a weight is a number, a function of the step or a tensor, got {modules[0]}; terms are added, a + b"
            )
        if len(by_teacher) > 1:
            raise ValueError(f"a term is weighed by one weighting of teachers, got {by_teacher}; write one of them")
        # A tuple keeps it out of this state dict: several weights may share it, and the sum saves it once.
        self._weighting = tuple(by_teacher)
        self.number = math.prod([1.0, *[_checks.weight("a weight", f) for f in factors if not _varies(f)]])
        self.schedules = tuple(f for f in factors if _varies(f) and not isinstance(f, Tensor))
        self.tensors = tuple(_scalar(f) for f in factors if isinstance(f, Tensor) and not _trained(f))
        self.learned = nn.ParameterList(_scalar(f) for f in factors if _trained(f))
        self.fixed = not any(map(_varies, factors))

    @property
    def weighting(self) -> Weighting | None:
        """The weighting by the teachers' predictions, if there is one."""
        return self._weighting[0] if self._weighting else None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors of the product."""
        return (self.number, *self.schedules, *self.tensors, *self.learned, *self._weighting)

    def at(self, step: int) -> float | Tensor:
        """The weight of a step without the weighting: a number of 0 or more, or a tensor, whose value isn't checked."""
        weight: Any = self.number
        if self.fixed or weight == 0:
            return self.number
        for schedule in self.schedules:
            value = schedule(step)
            if not isinstance(value, Tensor):
                value = _checks.weight(f"a weight at step {step}", value)
            weight = weight * value
        if not isinstance(weight, Tensor) and weight == 0:
            return 0.0
        for tensors in (self.tensors, self.learned):  # not `*self.learned`, which torch 2.9 can't compile
            for tensor in tensors:
                weight = weight * tensor.reshape(())
        return weight  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        words = [_word(f) for f in self.factors[1:]]
        return " * ".join(words if words and self.number == 1 else [f"{self.number:g}", *words])


def _varies(factor: Factor) -> bool:
    return isinstance(factor, Tensor) or callable(factor)


def _trained(factor: Factor) -> bool:
    return isinstance(factor, nn.Parameter)


def _scalar(tensor: Tensor) -> Tensor:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(
            f"a weight is one floating-point number, got a {tensor.dtype} tensor of shape {tuple(tensor.shape)}"
        )
    return tensor


def _word(factor: Factor) -> str:
    if isinstance(factor, Weighting):
        return repr(factor)
    if isinstance(factor, Tensor):
        return "learned" if isinstance(factor, nn.Parameter) else "tensor"
    return getattr(factor, "__name__", repr(factor))
