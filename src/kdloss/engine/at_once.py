"""All rows in one block: for small batches the bookkeeping of many blocks takes longer than the arithmetic."""

from typing import Any

import torch
from torch import Tensor

from kdloss.engine import block_sizes
from kdloss.engine.gradients import OfHead
from kdloss.engine.kernel import RowBlock, compute
from kdloss.engine.plan import Plan
from kdloss.engine.rows import Rows
from kdloss.engine.run import (
    Found,
    Problem,
    Student,
    read_by_rows,
    run,
    sized,
    slopes,
    switched_off,
    without_autocast,
)
from kdloss.engine.side import ExactSide, Side
from kdloss.engine.switch import wanted
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.reduction import on_cpu
from kdloss.targets import LazyLogits
from kdloss.targets.kinds import is_double

KINDS = (Tensor, LazyLogits)
AT_ONCE = 2**16
"""Up to this many logits Python takes as long as the arithmetic."""
FEW = 2**12
"""Up to this many logits, float64 throughout takes less time than converting between float64 and float32."""


def evaluate(problem: Problem, x: Student, weights: Tensor | None) -> Found:
    """Values `[tasks, rows]`; with weights of the same shape also the gradients of the weighted sum by x's tensors."""
    plan = Plan.of(problem.tasks)
    if type(x) in KINDS and at_once(problem, plan, x):
        return run_at_once(problem, plan, x, weights)
    return run(problem, plan, x, weights)


def at_once(problem: Problem, plan: Plan, x: Student) -> bool:
    """Whether all rows fit in one block on a CPU, and there are only tensors, lazy logits and closed forms."""
    if not on_cpu(x.device) or problem.overwrite or problem.shard is not None or plan.by_autograd or plan.top_k:
        return False
    shape = x.shape
    if shape.numel() > AT_ONCE or problem.rows > block_sizes.scratch_rows(x.device, shape[-1]) or wanted(x.device):
        return False
    groups = all(group.classes is None for group in plan.groups)
    return groups and all(type(read.x) in KINDS and read.x.shape == shape for read in read_by_rows(problem.tasks))


def run_at_once(problem: Problem, plan: Plan, x: Student, weights: Tensor | None) -> Found:
    """The same as `run` for all rows in one block, where `at_once` says so."""
    tasks, index, n, full = problem.tasks, problem.index, problem.rows, x.shape
    shape = full[:-1].numel(), full[-1]
    read = [x, *(read.x for read in read_by_rows(tasks))]
    wide = any(map(is_double, read))
    exact = not wide and full.numel() <= FEW
    dtype = torch.float64 if wide or exact else torch.float32
    lazy = {id(y): made(y, index, n) for y in read if isinstance(y, LazyLogits)}

    def rows(y: Any) -> Tensor:
        if id(y) in lazy:
            found: Tensor = lazy[id(y)](0, n)
        else:
            flat = y.detach().reshape(shape)
            found = flat if index is None else flat[index]
        return found.to(dtype)

    def task(k: int) -> Task:
        it = tasks[k]
        if isinstance(it, TeacherTask):
            return it.with_rows(rows(it.teacher), it.labels)
        return LabelTask(rows(it.labels), it.smoothing, it.class_weights) if it.soft else it

    by = None if weights is None else slopes(plan, weights, dtype)
    off, nowhere = switched_off(weights, len(tasks), n, problem.nonzero)
    if isinstance(x, LazyLogits):
        lazy[id(x)].zero_spoilt(nowhere)
    with without_autocast("cpu"):
        block = RowBlock(rows(x), task, by, off, nowhere)
        values, gradient = compute(plan, block, ExactSide if exact else Side)
        values = sized(plan, values).to(torch.float64 if wide else torch.float32)
        if gradient is None:
            return values, None
        if isinstance(x, LazyLogits):
            of_head = OfHead(x, lazy[id(x)], None)
            of_head.rows(0, n, gradient)
            of_head.block(0, n)
            return values, of_head.tensors()
        gradient = gradient.to(x.dtype)
        if index is not None:
            gradient = gradient.new_zeros(shape).index_copy_(0, index, gradient)
        return values, (gradient.reshape(full),)


def made(x: LazyLogits, index: Tensor | None, rows: int) -> Rows:
    """All rows of lazy logits, computed."""
    found = Rows(x, index)
    found.make(0, rows)
    return found
