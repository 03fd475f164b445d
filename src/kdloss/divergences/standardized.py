"""Logit standardisation: a wrapper around any divergence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdloss.engine import in_blocks
from kdloss.engine.task import unwrapped
from kdloss.reduction import alike
from kdloss.targets.kinds import AnyLogits
from kdloss.targets.sharded import localised


@dataclass(frozen=True)
class standardized:
    r"""A divergence of standardised logits: it doesn't depend on shift and scale of the student's logits.

    $D(\frac{s - \bar s}{\sigma_s}, \frac{t - \bar t}{\sigma_t})$ with mean and standard deviation
    (of a sample, as in the authors' code) over the classes of each position. Classes excluded with -inf stay
    excluded, and count in neither. The deviation is computed as $\sqrt{\sigma^2 + 10^{-14}}$.

    Shapes and options are the divergence's; `temperature` is the paper's base temperature.

    Raises: TypeError for a divergence that is no function; what the divergence raises.

    >>> import kdloss
    >>> student, teacher = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([7.0, 9.0, 17.0])
    >>> standardized(kdloss.divergences.forward_kl)(student, teacher, temperature=2.0) < 1e-6
    tensor(True)

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427.
    """

    one_class: ClassVar[bool] = False  # a single class is always 0 after standardisation
    any_scale: ClassVar[bool] = True  # so a temperature of the teacher's own would change nothing

    divergence: Callable[..., Tensor]

    def __post_init__(self) -> None:
        if not callable(self.divergence) or isinstance(unwrapped(self.divergence)[0], type):
            raise TypeError(
                f"standardized wraps a divergence, got {self.divergence!r}; write "
                "standardized(kdloss.divergences.forward_kl)"
            )

    @property
    def __wrapped__(self) -> Callable[..., Tensor]:
        return self.divergence  # for its signature

    @property
    def needs_classes(self) -> bool:
        """Whether the divergence needs every class in its place."""
        return getattr(unwrapped(self.divergence)[0], "needs_classes", False)

    @property
    def any_vocabulary(self) -> bool:
        """Whether two tensors may have different numbers of classes."""
        return getattr(unwrapped(self.divergence)[0], "any_vocabulary", False)

    def __call__(self, student: AnyLogits, teacher: AnyLogits, *args: Any, **options: Any) -> Tensor:
        """The divergence between standardised student and teacher; `args` and `options` are its own."""
        student, teacher = localised(student), localised(teacher)
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            teacher = teacher.detach()
            if student.is_floating_point() and teacher.is_floating_point():  # else the divergence raises
                student, teacher = map(_standard, alike(student, teacher))
            return self.divergence(student, teacher, *args, **options)
        return in_blocks(self, student, teacher, *args, **options)


def _standard(z: Tensor) -> Tensor:
    there = z.isfinite()
    number = there.sum(-1, keepdim=True)
    # The largest is subtracted first: a mean of large numbers would round their small differences.
    top = z.detach().masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    finite = (z - top).masked_fill(~there, 0)
    gap = (finite - finite.sum(-1, keepdim=True) / number.clamp_min(1)).masked_fill(~there, 0)
    variance = gap.square().sum(-1, keepdim=True) / (number - 1).clamp_min(1)
    return torch.where(there, gap / (variance + 1e-14).sqrt(), z)
