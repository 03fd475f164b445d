"""The engine as functions that autograd knows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import compress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.at_once import evaluate
from kdloss.engine.rows import matmul_dtype
from kdloss.engine.run import Problem, Student, without_autocast
from kdloss.engine.scaled import scaled
from kdloss.engine.total import blank
from kdloss.reduction import fill, on_cpu, precise, widest
from kdloss.targets import LazyLogits
from kdloss.targets.kinds import at, dense

_HOLE = object()
_ATOMS = {type(None), bool, int, float, FunctionType}
"""What holds no tensors, as most parts do."""


def fused(problem: Problem, student: Student, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all tasks' values by weights `[tasks, rows]` or `[tasks, 1]`; and the values, detached.

    Gradients are computed with the values; backward only scales them. A row of weight 0 gets nothing from its task,
    even where the value is infinite or no number.
    """
    tensors = parts(student)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = matmul_dtype(student) if isinstance(student, LazyLogits) else student.dtype
    if wanted and torch.float16 in (dtype, *(t.dtype for t in tensors)):
        # Before a GradScaler's factor is known, these gradients would be too small for float16.
        values = per_position(problem, student)
        return _weighted(values, weights), values.detach()
    loss, values = _apply(_Fused, problem, student, wanted, weights, *tensors)
    return loss, values


def per_position(problem: Problem, student: Student) -> Tensor:
    """The values of all tasks `[tasks, rows]`.

    One task's gradient is computed with them, where it is as large as the logits and has no fewer digits than what is
    multiplied with it in backward. Otherwise the gradient's pass follows in backward.
    """
    tensors = parts(student)
    alone = len(problem.tasks) == 1 and isinstance(student, Tensor)
    wanted = alone and torch.is_grad_enabled() and tensors[0].requires_grad and tensors[0].dtype.itemsize >= 4
    values: Tensor = _apply(_PerPosition, problem, student, wanted, *tensors)
    return values


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, student: Student, wanted: bool, weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        values, gradients = evaluate(problem, student, weights.detach() if wanted else None)
        ctx.gradients = gradients
        ctx.overwritten = problem.overwrite and wanted and isinstance(student, Tensor)
        ctx.autocast = autocast_of(student)
        kept, ctx.rest = apart((problem, student, weights, values))
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(values)
        return _weighted(values, weights, problem.nonzero), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        none = None, None, None
        if upstream is None:  # nobody asked for the loss
            return tuple(None for _ in ctx.needs_input_grad)
        gradients, ctx.gradients = ctx.gradients, None
        again = torch.is_grad_enabled()
        if ctx.overwritten and (gradients is None or again):
            raise RuntimeError(
                "the student's logits were overwritten with their gradient, so it can be had once and "
                "has no second derivative; write overwrite_logits=False"
            )
        wanted = ctx.needs_input_grad[3]
        if gradients is not None and not again and not wanted:
            return (*none, None, *scaled(gradients, upstream))
        problem, student, weights, values = together(ctx.rest, iter(ctx.saved_tensors))
        with ctx.autocast():
            if again:
                return (*none, *_by_autograd(problem, student, weights, values, upstream, wanted))
            of_weights = None
            if wanted:
                of_weights = (upstream * _countable(values, weights)).to(weights.dtype).sum_to_size(weights.shape)
            if gradients is not None:
                return (*none, of_weights, *scaled(gradients, upstream))
            return (*none, of_weights, *_by_rows(problem, student, weights * upstream))


class _PerPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, student: Student, wanted: bool, *tensors: Tensor) -> Tensor:
        ctx.autocast = autocast_of(student)
        one = torch.ones((), dtype=widest(student.device), device=student.device) if wanted else None
        values, gradients = evaluate(
            replace(problem, overwrite=False), student, None if one is None else one.expand(1, problem.rows)
        )
        ctx.gradient = None if gradients is None else gradients[0]
        kept, ctx.rest = apart((problem, student, values))
        ctx.save_for_backward(*kept)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        problem, student, values = together(ctx.rest, iter(ctx.saved_tensors))
        gradient, ctx.gradient = ctx.gradient, None
        with ctx.autocast():
            if torch.is_grad_enabled():
                one = torch.ones_like(upstream)
                return (None, None, *_by_autograd(problem, student, upstream, values, one, wanted=False))
            if gradient is not None:
                return None, None, None, _by_row_weights(gradient, problem, upstream[0])
            return (None, None, None, *_by_rows(problem, student, upstream))


def _by_row_weights(gradient: Tensor, problem: Problem, weights: Tensor) -> Tensor:
    """A gradient of one task times a number for each row, in place; exactly 0 where that is 0."""
    rows = gradient.view(gradient.shape[:-1].numel(), gradient.shape[-1])
    if problem.index is not None:
        weights = weights.new_zeros(len(rows)).index_copy_(0, problem.index, weights)
    weights = weights.unsqueeze(-1)
    blank(rows.mul_(weights), weights == 0)
    return gradient


def _by_rows(problem: Problem, student: Student, weights: Tensor) -> Sequence[Tensor | None]:
    """The student's gradients for these weights of the values."""
    if not any(t.requires_grad for t in parts(student)):
        return [None for _ in parts(student)]
    return evaluate(replace(problem, overwrite=False), student, weights.detach())[1] or ()


def _by_autograd(
    problem: Problem, student: Student, weights: Tensor, values: Tensor, upstream: Tensor, wanted: bool
) -> Iterator[Tensor | None]:
    """Gradients by the weights, if wanted, and by the student, which can be differentiated again."""
    if problem.shard is not None:
        raise RuntimeError("logits over a sharded vocabulary have no second derivative; write create_graph=False")
    off = (weights == 0) & ~values.isfinite()
    loss = _weighted(picked(problem, student, off), weights * upstream)
    tensors = (weights, *parts(student))
    needed = [wanted, *(t.requires_grad for t in tensors[1:])]
    found = iter(torch.autograd.grad(loss, list(compress(tensors, needed)), create_graph=True))
    return (next(found) if need else None for need in needed)


def picked(problem: Problem, student: Student, off: Tensor) -> Tensor:
    """The values of all rows at once, by plain functions; zeros are compared where a task is `off`."""
    positions = len(student.shape) - 1

    def pick(t: Tensor) -> Tensor:
        flat = t.flatten(0, positions - 1) if positions else t.unsqueeze(0)
        return flat if problem.index is None else flat[problem.index]

    z = precise(dense(at(student, pick)))  # once, so that the tasks' gradients meet before they are rounded
    values = []
    for task, out in zip(problem.tasks, off, strict=True):
        there, on = task.at(pick), ~out
        if not on_cpu(out.device) or out.any():
            values.append(there.at(partial(fill, mask=on)).values(fill(z, on)))
        else:
            values.append(there.values(z))
    return torch.stack(values)


def autocast_of(student: Student) -> Callable[[], AbstractContextManager[Any]]:
    """A context like the present one, for a backward that runs outside of it."""
    kind = student.device.type
    enabled = torch.is_autocast_enabled(kind)
    if not enabled:
        return partial(without_autocast, kind)
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=True)


def parts(student: Student) -> Sequence[Tensor]:
    """The tensors that get gradients."""
    if isinstance(student, Tensor):
        return (student,)
    return (student.hidden, student.weight, *(() if student.bias is None else (student.bias,)))


def apart(x: Any) -> tuple[list[Tensor], Any]:
    """The tensors in something, for autograd to keep and let go of, and the same with holes in their places."""
    tensors: list[Tensor] = []
    return tensors, _without(x, tensors)


def _without(x: Any, tensors: list[Tensor]) -> Any:
    if isinstance(x, Tensor):
        tensors.append(x)
        return _HOLE
    return _each(_without, x, tensors)


def together(x: Any, tensors: Iterator[Tensor]) -> Any:
    """Something with its tensors in the holes; what was checked once, where it may be masked, isn't checked again."""
    return next(tensors) if x is _HOLE else _each(together, x, tensors)


def _each(change: Callable[..., Any], x: Any, tensors: Any) -> Any:
    kind = type(x)
    if kind in (list, tuple):
        return kind([part if type(part) in _ATOMS else change(part, tensors) for part in x])
    if not hasattr(kind, "__dataclass_fields__"):
        return x
    other, parts = object.__new__(kind), vars(x).items()
    vars(other).update({name: part if type(part) in _ATOMS else change(part, tensors) for name, part in parts})
    return other


def _countable(values: Tensor, weights: Tensor) -> Tensor:
    """Values with 0 where they are infinite or no number but count for nothing."""
    return values.masked_fill((weights == 0) & ~values.isfinite(), 0)


def _weighted(values: Tensor, weights: Tensor, nonzero: bool = False) -> Tensor:
    counted = values if nonzero else _countable(values, weights)
    return (counted * weights).sum(1).sum().to(values.dtype)  # two halves are one whole


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)
