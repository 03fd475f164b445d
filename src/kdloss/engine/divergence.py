"""Let divergences written for dense logits take every kind of logits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kdloss import _checks
from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.fused import per_position
from kdloss.engine.overwritten import refuse
from kdloss.engine.run import Problem
from kdloss.engine.task import TeacherTask, unwrapped
from kdloss.reduction import takes
from kdloss.targets import TopKLogits
from kdloss.targets.kinds import AnyLogits
from kdloss.targets.looks import look_again
from kdloss.targets.sharded import localised


@runtime_checkable
class Divergence(Protocol):
    """Any function that is called like `kdloss.divergences.forward_kl`."""

    def __call__(self, student: Any, teacher: Any, /, *, temperature: float = 1.0) -> Tensor:
        """One value per position."""
        ...


def any_logits(
    closed_form: ClosedForm | None = None,
    *,
    needs_logits: bool = False,
    needs_classes: bool = False,
    any_vocabulary: bool = False,
    one_class: bool = False,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let a divergence on tensors take every kind of logits, in blocks of rows.

    `needs_logits`: it can't be computed from probabilities. `needs_classes`: it can't be computed from some classes
    and a bucket, whose places say nothing. `any_vocabulary`: two tensors may have different numbers of classes.
    `one_class`: it makes sense for logits of one class.
    """

    def decorate(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(plain)
        def divergence(student: AnyLogits, teacher: AnyLogits, *args: Any, **options: Any) -> Tensor:
            student, teacher = localised(student), localised(teacher)
            refuse(student, teacher)
            tensors = isinstance(student, Tensor) and isinstance(teacher, Tensor)
            if tensors and (closed_form is None or unblockable(student, None)):
                return plain(student, teacher, *args, **options)
            return in_blocks(divergence, student, teacher, *args, **options)

        about = {
            "as_written": plain,
            "closed_form": closed_form,
            "needs_logits": needs_logits,
            "needs_classes": needs_classes,
            "any_vocabulary": any_vocabulary,
            "one_class": one_class,
        }
        vars(divergence).update(about)
        return divergence

    return decorate


def in_blocks(
    divergence: Callable[..., Tensor],
    student: Any,
    teacher: AnyLogits,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A divergence between logits of any kind, at every position, in blocks of rows where possible."""
    temperature = _checks.temperature(temperature)
    task = TeacherTask(partial(divergence, **options), teacher.detach(), temperature, labels=labels)
    task.check(student)
    if isinstance(teacher, TopKLogits):
        look_again(teacher, student.shape[-1], mask)
    if unblockable(student, divergence):
        return task.values(student, mask)
    positions = student.shape[:-1]
    flat = None if labels is None else labels.reshape(-1)
    problem, local = Problem.of([replace(task, labels=flat)], student, None, positions.numel())
    return per_position(problem, local)[0].reshape(positions)


def unblockable(student: AnyLogits, divergence: Callable[..., Any] | None) -> bool:
    """Whether all rows must be computed at once by the plain function.

    That is so under `torch.compile`, `torch.func` and forward-mode autograd, for tensors without data, for divergences
    that compare positions with each other, and for those with trained parameters of their own.
    """
    x = getattr(student, "hidden", student)
    within = torch.compiler.is_compiling() or student.device.type == "meta" or isinstance(x, FakeTensor)
    transformed = torch._C._functorch.maybe_current_level() is not None
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if within or transformed or forward_mode or divergence is None:
        return within or transformed or forward_mode
    function, _ = unwrapped(divergence)
    trained = isinstance(function, nn.Module) and any(p.requires_grad for p in function.parameters())
    return trained or takes(divergence, "mask")
