"""The engine as functions that autograd knows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.kernel import Weights
from kdloss.engine.rows import matmul_dtype
from kdloss.engine.run import Problem, Student, run
from kdloss.targets import LazyLogits, at


def fused(problem: Problem, student: Student, ce: Tensor, kd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over rows of ce·(cross-entropy) + kd·(divergence), and both values of each row, detached.

    Gradients are computed with the values; backward only scales them.
    """
    tensors = parts(student)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = matmul_dtype(student) if isinstance(student, LazyLogits) else student.dtype
    if wanted and torch.float16 in (dtype, *(t.dtype for t in tensors)):
        # Before a GradScaler's factor is known, these gradients would be too small for float16.
        ce_values, kd_values = per_position(problem, student)
        loss = _weighted(ce_values, kd_values, ce, kd)
        return loss, ce_values.detach(), kd_values.detach()
    loss, ce_values, kd_values = _apply(_Fused, problem, student, ce, kd, wanted, *tensors)
    return loss, ce_values, kd_values


def per_position(problem: Problem, student: Student) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of every row; the gradient's pass follows in backward."""
    ce, kd = _apply(_PerPosition, problem, student, *parts(student))
    return ce, kd


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, student: Student, ce: Tensor, kd: Tensor, wanted: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = Weights(ce.expand(problem.rows).unsqueeze(-1), kd.expand(problem.rows).unsqueeze(-1))
        ce_values, kd_values, gradients = run(problem, student, weights if wanted else None)
        ctx.gradients = None if gradients is None else gradients.tensors()
        ctx.overwritten = problem.overwrite and wanted and isinstance(student, Tensor)
        ctx.autocast = autocast_of(student)
        kept, ctx.together = apart((problem, student, ce, kd))
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(ce_values, kd_values)
        return _weighted(ce_values, kd_values, ce, kd), ce_values, kd_values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        none = (None,) * 5
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and not torch.is_grad_enabled():
            return (*none, *(None if g is None else g.mul_(upstream) for g in gradients))
        if ctx.overwritten:
            raise RuntimeError(
                "the student's logits were overwritten with their gradient, so it can be had once and "
                "has no second derivative; write overwrite_logits=False"
            )
        problem, student, ce, kd = ctx.together(iter(ctx.saved_tensors))
        with ctx.autocast():
            return (*none, *_backward(problem, student, ce * upstream, kd * upstream))


class _PerPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, student: Student, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.autocast = autocast_of(student)
        kept, ctx.together = apart((problem, student))
        ctx.save_for_backward(*kept)
        ce, kd, _ = run(problem, student, None)
        return ce, kd

    @staticmethod
    def backward(ctx: Any, ce: Tensor, kd: Tensor) -> Any:
        problem, student = ctx.together(iter(ctx.saved_tensors))
        with ctx.autocast():
            return (None, None, *_backward(problem, student, ce, kd))


def _backward(problem: Problem, student: Student, ce: Tensor, kd: Tensor) -> Sequence[Tensor | None]:
    """Gradients for these weights of the terms; by autograd where they are to be differentiated again."""
    tensors, problem = parts(student), replace(problem, overwrite=False)
    ce, kd = ce.expand(problem.rows), kd.expand(problem.rows)
    if not torch.is_grad_enabled():
        gradients = run(problem, student, Weights(ce.unsqueeze(-1), kd.unsqueeze(-1)))[2]
        return () if gradients is None else gradients.tensors()
    if problem.shard is not None:
        raise RuntimeError("logits over a sharded vocabulary have no second derivative; write create_graph=False")
    values = specification(problem, student)
    loss = torch.stack([(w * v).sum() for w, v in zip((ce, kd), values, strict=True) if v is not None]).sum()
    wanted = [t for t in tensors if t.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, create_graph=True))
    return [next(found) if t.requires_grad else None for t in tensors]


def specification(problem: Problem, student: Student) -> tuple[Tensor | None, Tensor | None]:
    """The terms of all rows at once, by plain functions."""
    positions = len(student.shape) - 1

    def pick(t: Tensor) -> Tensor:
        flat = t.flatten(0, positions - 1) if positions else t.unsqueeze(0)
        return flat if problem.index is None else flat[problem.index]

    teacher = None if problem.teacher is None else at(problem.teacher, pick)
    return problem.task.terms(at(student, pick), teacher, problem.labels)


def autocast_of(student: Student) -> Callable[[], torch.autocast]:
    """A context like the present one, for a backward that runs outside of it."""
    kind = student.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype=dtype, enabled=enabled)


def parts(student: Student) -> Sequence[Tensor]:
    """The tensors that get gradients."""
    if isinstance(student, Tensor):
        return (student,)
    return (student.hidden, student.weight, *(() if student.bias is None else (student.bias,)))


def apart(x: Any) -> tuple[Sequence[Tensor], Callable[[Iterator[Tensor]], Any]]:
    """The tensors in something, for autograd to keep and let go of, and how to put it together again."""
    if isinstance(x, Tensor):
        return [x], next
    if is_dataclass(x):
        named = {field.name: apart(getattr(x, field.name)) for field in fields(x)}
    else:
        named = {str(i): apart(y) for i, y in enumerate(x)} if isinstance(x, list | tuple) else {}
    tensors = [tensor for found, _ in named.values() for tensor in found]
    if not tensors:
        return [], lambda _: x
    return tensors, partial(_together, type(x), {name: build for name, (_, build) in named.items()})


def _together(kind: Any, named: Mapping[str, Callable[[Iterator[Tensor]], Any]], them: Iterator[Tensor]) -> Any:
    made = {name: build(them) for name, build in named.items()}
    return kind(made.values()) if issubclass(kind, list | tuple) else kind(**made)


def _weighted(ce_values: Tensor, kd_values: Tensor, ce: Tensor, kd: Tensor) -> Tensor:
    # A term that nobody asked for has value 0 and may have any weight.
    return (ce * ce_values + kd * kd_values).sum()


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)
