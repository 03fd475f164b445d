"""A separate temperature for the teacher: a wrapper around any divergence of probabilities."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.engine import in_blocks
from kdloss.engine.task import unwrapped
from kdloss.reduction import alike
from kdloss.targets.kinds import AnyLogits
from kdloss.targets.sharded import localised


@dataclass(frozen=True)
class with_teacher_temperature:
    r"""A divergence in which the teacher has its own temperature; `temperature` is then the student's.

    $D(s, \frac{T}{T'} t; T)$ with $T'$ = `teacher_temperature`: the divergence of $q = \mathrm{softmax}(s/T)$ from
    $p = \mathrm{softmax}(t/T')$. Value and gradient are 0 where q and p are equal, so at $s = t\,T/T'$ and not at the
    teacher's own logits. A factor T² uses the student's temperature, which may be a schedule.

    Shapes and options are the divergence's. A teacher that gives probabilities (top-k logits, a mixture of
    probabilities) is refused, since its temperature is fixed.

    Raises: TypeError for a divergence that is no function; ValueError for a temperature that is not finite and
    positive, and for a divergence of logits (`logit_mse`, `bernoulli_kl`) or a standardised one, on which a teacher's
    temperature has no meaning; write `standardized(with_teacher_temperature(...))`; what the divergence raises.

    >>> import kdloss
    >>> student, teacher = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 4.0, 8.0])
    >>> with_teacher_temperature(kdloss.divergences.forward_kl, 4.0)(student, teacher)
    tensor(0.)

    Zheng, Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching", arXiv:2402.11148, with T = 1.
    """

    needs_logits: ClassVar[bool] = True  # to be divided by another temperature

    divergence: Callable[..., Tensor]
    teacher_temperature: float

    def __post_init__(self) -> None:
        if not callable(self.divergence) or isinstance(unwrapped(self.divergence)[0], type):
            raise TypeError(
                f"with_teacher_temperature wraps a divergence, got {self.divergence!r}; write "
                "with_teacher_temperature(kdloss.divergences.forward_kl, 4.0)"
            )
        _checks.temperature(self.teacher_temperature)
        function = unwrapped(self.divergence)[0]
        if getattr(function, "needs_logits", False) or getattr(function, "any_scale", False):
            raise ValueError(
                f"{getattr(function, '__name__', function)} has no use for a teacher's temperature: it compares no "
                "probabilities at one; take forward_kl, or write standardized(with_teacher_temperature(...))"
            )

    @property
    def __wrapped__(self) -> Callable[..., Tensor]:
        return self.divergence  # for its signature

    @property
    def one_class(self) -> bool:
        """Whether the divergence makes sense for logits of one class."""
        return getattr(unwrapped(self.divergence)[0], "one_class", True)

    @property
    def any_vocabulary(self) -> bool:
        """Whether two tensors may have different numbers of classes."""
        return getattr(unwrapped(self.divergence)[0], "any_vocabulary", False)

    @property
    def closed_form(self) -> Callable[..., Any] | None:
        """The divergence's closed form, if it has one; the engine applies the teacher's temperature."""
        function, options = unwrapped(self.divergence)
        form = getattr(function, "closed_form", None)
        if form is None:
            return None
        options = {name: x for name, x in options.items() if name not in ("temperature", "t_squared")}
        return partial(form, **options)

    def __call__(self, student: AnyLogits, teacher: AnyLogits, *args: Any, **options: Any) -> Tensor:
        """The divergence of student from teacher, each at its own temperature; `args` and `options` are its own."""
        student, teacher = localised(student), localised(teacher)
        if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
            return in_blocks(self, student, teacher, *args, **options)
        temperature = options.get("temperature", unwrapped(self.divergence)[1].get("temperature", 1.0))
        ratio = _checks.temperature(temperature) / self.teacher_temperature
        # Otherwise the divergence raises.
        if student.is_floating_point() and teacher.is_floating_point() and teacher.shape[-1:].numel():
            student, teacher = alike(student, teacher.detach())
            teacher = _scaled(teacher, ratio)
        return self.divergence(student, teacher, *args, **options)


def _scaled(z: Tensor, by: float) -> Tensor:
    """Logits times a number. The largest is subtracted first, or the product would round small differences.

    A power of 2 rounds nothing.
    """
    if math.frexp(by)[0] == 0.5:
        return z * by
    top = z.amax(-1, keepdim=True)
    return (z - top.masked_fill(top == -torch.inf, 0)) * by
