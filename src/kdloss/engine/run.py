"""Compute all rows, one block at a time: values at every position, and gradients by the student's tensors."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from kdloss.engine import block_sizes
from kdloss.engine.block_sizes import equal_blocks
from kdloss.engine.compiled import CompiledBlock, compiled_block_of
from kdloss.engine.gradients import Gradients, OfHead, OfLogits
from kdloss.engine.kernel import MakeSide, RowBlock, compute
from kdloss.engine.overwritten import refuse
from kdloss.engine.plan import Plan, check_sharded
from kdloss.engine.rows import Rows
from kdloss.engine.side import Side
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.engine.teachers import Read, Teachers
from kdloss.reduction import on_cpu
from kdloss.targets import LazyLogits, ShardedLogits
from kdloss.targets.kinds import AnyLogits, is_double
from kdloss.targets.sharded import Shard

Student = Tensor | LazyLogits
Found = tuple[Tensor, Sequence[Tensor | None] | None]


@dataclass(frozen=True)
class Problem:
    """Tasks, and the positions at which they are computed.

    `index` holds the flat positions that count (None: all), and `rows` is their number. Class labels are given for
    these positions alone. `nonzero` says that no weight is 0.
    """

    tasks: tuple[Task, ...]
    index: Tensor | None
    rows: int
    overwrite: bool = False
    shard: Shard | None = None
    nonzero: bool = False

    @classmethod
    def of(
        cls,
        tasks: Sequence[Task],
        student: Student | ShardedLogits,
        index: Tensor | None,
        rows: int,
        overwrite: bool = False,
        nonzero: bool = False,
    ) -> "tuple[Problem, Student]":
        """The problem, and the student's logits in this process (its shard, where the vocabulary is sharded)."""
        refuse(student, *(t.teacher for t in tasks if isinstance(t, TeacherTask)))
        tasks = [t if isinstance(t, LabelTask) else t.over_shared_classes(student) for t in tasks]
        for task in tasks:
            if task.labels is not None and not task.labels.is_floating_point() and task.labels.shape != (rows,):
                raise ValueError(
                    f"labels have shape {tuple(task.labels.shape)} and there are {rows} rows; give one label per row"
                )
        if not isinstance(student, ShardedLogits):
            return cls(tuple(tasks), index, rows, overwrite, None, nonzero), student
        shard = student.shard
        local = tuple(t if isinstance(t, LabelTask) else replace(t, teacher=_local(t.teacher)) for t in tasks)
        check_sharded(local, shard)
        return cls(local, index, rows, overwrite, shard, nonzero), student.local


def run(problem: Problem, plan: Plan, x: Student, weights: Tensor | None) -> Found:
    """Values `[tasks, rows]`; with weights of the same shape also the gradients of the weighted sum by x's tensors."""
    tasks, n, classes, device, shard = problem.tasks, problem.rows, x.shape[-1], x.device, problem.shard
    student, teachers = Rows(x, problem.index), Teachers(read_by_rows(tasks), problem.index)
    off, nowhere = switched_off(weights, len(tasks), n, problem.nonzero)
    spoilt = student.zero_spoilt(nowhere)
    gradients: Gradients | None = None
    if weights is not None:
        gradients = OfHead(x, student, shard) if isinstance(x, LazyLogits) else OfLogits(x, student, problem.overwrite)
    per_block = block_sizes.scratch_rows(device, classes, plan.coarseness)
    per_student, per_teacher = block_sizes.made_rows(device, n, student.row_bytes, *teachers.row_bytes)
    if shard is not None:  # the same blocks in every process, and few of them: each needs collectives
        per_block = max(block_sizes.block_rows(device, 8 * max(shard.sizes)) // 2, 1)
        per_student = per_teacher = per_block
    wide = any(map(is_double, (x, *(task.teacher for task in tasks if isinstance(task, TeacherTask)))))
    dtype = torch.float64 if wide else torch.float32
    compiled_block = None if shard is not None else compiled_block_of(plan, tasks, x, dtype)
    if compiled_block is not None:
        scratch = plan.scratch or not (student.in_memory and teachers.in_memory)
        per_block = block_sizes.compiled_rows(device, classes, n, plan.top_k, scratch)
    by = None if weights is None else slopes(plan, weights, dtype)
    side = partial(Side, shard=shard) if shard is not None else Side
    found = []
    with without_autocast(device.type):
        for start, stop in equal_blocks(n, per_student):
            student.make(start, stop)
            for first, last in equal_blocks(stop - start, per_teacher, start):
                teachers.make(first, last, per_block)
                for i, j in equal_blocks(last - first, per_block, first):
                    task = partial(task_of, tasks, teachers, i, j)
                    beside = _cut(by, i, j), [None if o is None else _cut(o, i, j) for o in off], _cut(nowhere, i, j)
                    block = RowBlock(student(i, j), task, *beside)
                    if compiled_block is None or j - i < 2:
                        found.append(uncompiled(plan, block, side, gradients, i, j, dtype))
                    else:
                        found.append(compiled(compiled_block, plan, block, gradients, i, j))
            if gradients is not None:
                gradients.block(start, stop)
    values = found[0] if len(found) == 1 else torch.cat([torch.empty(len(tasks), 0, device=device), *found], 1)
    values = values if spoilt is None else values.masked_fill(spoilt, torch.nan)
    return sized(plan, values).to(dtype), None if gradients is None else gradients.tensors()


def sized(plan: Plan, values: Tensor) -> Tensor:
    """Values `[tasks, rows]` times each task's factor, for example T²."""
    return values if set(plan.sizes) == {1.0} else values * column_of(tuple(plan.sizes), values.dtype, values.device)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Turn autocast off, without the cost of the context where it is off already."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def slopes(plan: Plan, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each task's slope, `[tasks, rows, 1]` or `[tasks, 1, 1]`."""
    if set(plan.slopes) != {1.0}:
        weights = weights * column_of(tuple(plan.slopes), weights.dtype, weights.device)
    return weights.to(dtype).unsqueeze(-1)


@lru_cache(maxsize=64)
def column_of(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a column tensor, cached, since most steps use the same ones. The tensor is read-only."""
    with torch.inference_mode(False):
        if on_cpu(device):
            return torch.tensor(numbers, dtype=dtype, device=device).unsqueeze(1)
        return torch.cat([torch.full((1, 1), x, dtype=dtype, device=device) for x in numbers])  # no copy from the host


def uncompiled(
    plan: Plan, block: RowBlock, side: MakeSide, gradients: Gradients | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """The values of a block of rows; the block's gradient is added to `gradients`."""
    place = None if gradients is None or gradients.in_place else gradients.place(start, stop)
    place = None if place is None or place.dtype != dtype else place
    block.z = block.z.to(dtype)
    values, gradient = compute(plan, block, side, place)
    if gradients is not None and gradient is not None and place is None:
        gradients.rows(start, stop, gradient)
    return values


def compiled(
    run_block: CompiledBlock, plan: Plan, block: RowBlock, gradients: Gradients | None, start: int, stop: int
) -> Tensor:
    """The same as `uncompiled`, by a compiled block, which writes the gradient to its final place."""
    if gradients is None:
        return run_block(plan, block, None)
    place = gradients.place(start, stop)
    if place is not None:
        return run_block(plan, block, None if gradients.in_place else place)
    fresh = torch.empty_like(block.z)
    values = run_block(plan, block, fresh)
    gradients.rows(start, stop, fresh)
    return values


def task_of(tasks: Sequence[Task], teachers: Teachers, start: int, stop: int, k: int) -> Task:
    """Task k for rows start to stop."""
    task = tasks[k]
    if isinstance(task, LabelTask):
        labels = teachers(task.labels, start, stop, 1.0) if task.soft else task.labels[start:stop]
        return LabelTask(labels, task.smoothing, task.class_weights)
    rows = teachers(task.teacher, start, stop, task.temperature, task.teacher_classes)
    return task.with_rows(rows, None if task.labels is None else task.labels[start:stop])


def _cut(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Rows start to stop of `[..., rows, 1]`; `[..., 1, 1]`, which stands for all rows, as it is."""
    return x if x is None or x.shape[-2] in (1, stop - start) else x[..., start:stop, :]


def read_by_rows(tasks: Sequence[Task]) -> Iterator[Read]:
    """The teachers, and the labels that are probabilities: both are given at all positions."""
    for task in tasks:
        if isinstance(task, TeacherTask):
            yield Read(task.teacher, task.temperature, task.teacher_classes)
        elif task.soft:
            yield Read(task.labels)


def switched_off(
    weights: Tensor | None, tasks: int, rows: int, nonzero: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """The rows `[rows, 1]` where each task has weight 0, and those where all tasks have.

    On a CPU None stands for no such row. On other devices the test would need a synchronisation.
    """
    if weights is None or nonzero:
        return [None] * tasks, None
    off = (weights == 0).expand(tasks, rows).unsqueeze(-1)
    if not on_cpu(off.device):
        return list(off), off.all(0)
    some = off.flatten(1).any(1).tolist()
    return [o if there else None for o, there in zip(off, some, strict=True)], off.all(0) if all(some) else None


def _local(x: AnyLogits) -> AnyLogits:
    return x.local if isinstance(x, ShardedLogits) else x
