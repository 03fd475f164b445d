"""`autograd.Function`s around the engine."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import compress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from kdloss.engine.at_once import evaluate
from kdloss.engine.overwritten import mark
from kdloss.engine.rows import matmul_dtype
from kdloss.engine.run import Problem, Student, without_autocast
from kdloss.engine.scaled import scaled
from kdloss.engine.total import blank
from kdloss.reduction import fill, on_cpu, precise, savable, widest
from kdloss.targets import LazyLogits
from kdloss.targets.kinds import at, dense

_HOLE = object()
_ATOMS = {type(None), bool, int, float, FunctionType}
"""Types that hold no tensors. Most values in a problem are of these types."""


def fused(problem: Problem, student: Student, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of all tasks' values, and the values, detached. Weights are `[tasks, rows]` or `[tasks, 1]`.

    The forward pass computes the gradients with the values; backward only scales them. A row of weight 0 gets nothing
    from its task, even where the value is infinite or NaN.
    """
    tensors = tensors_of(student)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = matmul_dtype(student) if isinstance(student, LazyLogits) else student.dtype
    if wanted and torch.float16 in (dtype, *(t.dtype for t in tensors)):
        # Gradients computed now, before the GradScaler's factor is known, would be too small for float16.
        values = per_position(problem, student)
        return _weighted(values, weights), values.detach()
    loss, values = _apply(_Fused, problem, student, wanted, weights, *tensors)
    return loss, values


def per_position(problem: Problem, student: Student) -> Tensor:
    """The values of all tasks `[tasks, rows]`.

    For a single task on logits of 32 bits or more, the forward pass computes the gradient with the values. Otherwise
    backward computes it in a second pass: several tasks have several weights, which are only known then, and a 16-bit
    gradient would be rounded before it is multiplied.
    """
    tensors = tensors_of(student)
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
        saved, ctx.rebuild = flatten((problem, student, weights, values))
        ctx.save_for_backward(*saved)
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
            found = scaled(gradients, upstream)
            if ctx.overwritten:
                mark(gradients[0])  # again, since this wrote there
            return (*none, None, *found)
        problem, student, weights, values = ctx.rebuild(ctx.saved_tensors)
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
        saved, ctx.rebuild = flatten((problem, student, values))
        ctx.save_for_backward(*saved)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        problem, student, values = ctx.rebuild(ctx.saved_tensors)
        gradient, ctx.gradient = ctx.gradient, None
        with ctx.autocast():
            if torch.is_grad_enabled():
                one = torch.ones_like(upstream)
                return (None, None, *_by_autograd(problem, student, upstream, values, one, wanted=False))
            if gradient is not None:
                return None, None, None, _by_row_weights(gradient, problem, upstream[0])
            return (None, None, None, *_by_rows(problem, student, upstream))


def _by_row_weights(gradient: Tensor, problem: Problem, weights: Tensor) -> Tensor:
    """Multiply one task's gradient by a weight for each row, in place; a weight of 0 gives exactly 0."""
    rows = gradient.view(gradient.shape[:-1].numel(), gradient.shape[-1])
    if problem.index is not None:
        weights = weights.new_zeros(len(rows)).index_copy_(0, problem.index, weights)
    weights = weights.unsqueeze(-1)
    blank(rows.mul_(weights), weights == 0)
    return gradient


def _by_rows(problem: Problem, student: Student, weights: Tensor) -> Sequence[Tensor | None]:
    """The gradients of the student's tensors for these weights of the values."""
    if not any(t.requires_grad for t in tensors_of(student)):
        return [None for _ in tensors_of(student)]
    return evaluate(replace(problem, overwrite=False), student, weights.detach())[1] or ()


def _by_autograd(
    problem: Problem, student: Student, weights: Tensor, values: Tensor, upstream: Tensor, wanted: bool
) -> Iterator[Tensor | None]:
    """Gradients by the weights, if wanted, and by the student's tensors; both can be differentiated again."""
    if problem.shard is not None:
        raise RuntimeError("logits over a sharded vocabulary have no second derivative; write create_graph=False")
    off = (weights == 0) & ~values.isfinite()
    loss = _weighted(plain_values(problem, student, off), weights * upstream)
    tensors = (weights, *tensors_of(student))
    needed = [wanted, *(t.requires_grad for t in tensors[1:])]
    found = iter(torch.autograd.grad(loss, list(compress(tensors, needed)), create_graph=True))
    return (next(found) if need else None for need in needed)


def plain_values(problem: Problem, student: Student, off: Tensor) -> Tensor:
    """The values of all rows at once, computed by the plain functions; a task that is `off` in a row compares zeros."""
    positions = len(student.shape) - 1

    def pick(t: Tensor) -> Tensor:
        flat = t.flatten(0, positions - 1) if positions else t.unsqueeze(0)
        return flat if problem.index is None else flat[problem.index]

    rows = at(student, pick)
    if isinstance(rows, LazyLogits):  # the head's gradient would multiply NaN by 0
        rows = rows.with_hidden(fill(rows.hidden, ~off.all(0)))
    z = precise(dense(rows))  # once, so that the tasks' gradients are added before they are rounded
    values = []
    for task, out in zip(problem.tasks, off, strict=True):
        there, on = task.at(pick), ~out
        if not on_cpu(out.device) or out.any():
            values.append(there.at(partial(fill, mask=on)).values(fill(z, on)))
        else:
            values.append(there.values(z))
    return torch.stack(values)


def autocast_of(student: Student) -> Callable[[], AbstractContextManager[Any]]:
    """The current autocast setting, to restore in backward, which runs outside of the caller's context."""
    kind = student.device.type
    enabled = torch.is_autocast_enabled(kind)
    if not enabled:
        return partial(without_autocast, kind)
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=True)


def tensors_of(student: Student) -> Sequence[Tensor]:
    """The student's tensors, which may need gradients: its logits, or hidden states, weight and bias."""
    if isinstance(student, Tensor):
        return (student,)
    return (student.hidden, student.weight, *(() if student.bias is None else (student.bias,)))


def flatten(value: Any) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Any]]:
    """Split a nested value into its tensors and a function that rebuilds it.

    The value is nested in lists, tuples and dataclasses. Autograd saves the tensors, and frees them after backward.
    """
    tensors: list[Tensor] = []
    skeleton = _take_tensors(value, tensors)

    def rebuild(saved: Iterable[Tensor]) -> Any:
        return _put_tensors(skeleton, iter(saved))

    return tensors, rebuild


def _take_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """The same value with `_HOLE` in place of each tensor, which is appended to `tensors`."""
    if isinstance(x, Tensor):
        tensors.append(savable(x))
        return _HOLE
    return _map_items(_take_tensors, x, tensors)


def _put_tensors(x: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with the next of `tensors` in place of each `_HOLE`."""
    return next(tensors) if x is _HOLE else _map_items(_put_tensors, x, tensors)


def _map_items(change: Callable[..., Any], x: Any, tensors: Any) -> Any:
    """Rebuild a list, tuple or dataclass of changed items.

    A dataclass is rebuilt without its `__post_init__`: it was checked already, and its tensors may be masked now.
    """
    kind = type(x)
    if kind in (list, tuple):
        return kind([item if type(item) in _ATOMS else change(item, tensors) for item in x])
    if not hasattr(kind, "__dataclass_fields__"):
        return x
    other, fields = object.__new__(kind), vars(x).items()
    vars(other).update({name: item if type(item) in _ATOMS else change(item, tensors) for name, item in fields})
    return other


def _countable(values: Tensor, weights: Tensor) -> Tensor:
    """The values, with 0 in place of those that are infinite or NaN and have weight 0."""
    return values.masked_fill((weights == 0) & ~values.isfinite(), 0)


def times(values: Tensor, weights: Tensor | float) -> Tensor:
    """Values times weights, where 0 times infinity or NaN is 0."""
    return (_countable(values, weights) if isinstance(weights, Tensor) else values) * weights


def _weighted(values: Tensor, weights: Tensor, nonzero: bool = False) -> Tensor:
    counted = values if nonzero else _countable(values, weights)
    return (counted * weights).sum(1).sum().to(values.dtype)  # by task: two of half weight equal one exactly


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)
