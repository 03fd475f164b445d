"""All rows, a block at a time: values at every position, and gradients of the student's tensors."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from kdloss.engine import block_sizes
from kdloss.engine.block_sizes import equal_blocks
from kdloss.engine.compiled import Block, block_of
from kdloss.engine.gradients import Gradients, OfHead, OfLogits
from kdloss.engine.kernel import Few, MakeSide, compute
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
    """Tasks and where they are to be done: `rows` and labels that are classes are of the positions in `index`.

    `nonzero` where no weight is 0.
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
        """The problem, and the student's part in it in this process."""
        tasks = [t if isinstance(t, LabelTask) else t.over_shared_classes(student) for t in tasks]
        for task in tasks:
            if task.labels is not None and not task.labels.is_floating_point() and task.labels.shape != (rows,):
                raise ValueError(
                    f"labels have shape {tuple(task.labels.shape)}; there are {rows} rows, write one of each"
                )
        if not isinstance(student, ShardedLogits):
            return cls(tuple(tasks), index, rows, overwrite, None, nonzero), student
        shard = student.shard
        local = tuple(t if isinstance(t, LabelTask) else replace(t, teacher=_local(t.teacher)) for t in tasks)
        check_sharded(local, shard)
        return cls(local, index, rows, overwrite, shard, nonzero), student.local


def run(problem: Problem, plan: Plan, x: Student, weights: Tensor | None) -> Found:
    """Values `[tasks, rows]`; given weights of the same shape, gradients of the weighted sum by x's tensors, too."""
    tasks, n, classes, device, shard = problem.tasks, problem.rows, x.shape[-1], x.device, problem.shard
    student, teachers = Rows(x, problem.index), Teachers(read_by_rows(tasks), problem.index)
    off, nowhere = switched_off(weights, len(tasks), n, problem.nonzero)
    if nowhere is not None:
        student.clear(nowhere)
    gradients: Gradients | None = None
    if weights is not None:
        gradients = OfHead(x, student, shard) if isinstance(x, LazyLogits) else OfLogits(x, student, problem.overwrite)
    few = block_sizes.scratch_rows(device, classes, plan.coarseness)
    many, theirs = block_sizes.made_rows(device, n, student.row_bytes, *teachers.row_bytes)
    if shard is not None:  # every process cuts alike, and seldom: collectives
        few = many = theirs = max(block_sizes.block_rows(device, 8 * max(shard.sizes)) // 2, 1)
    wide = any(map(is_double, (x, *(task.teacher for task in tasks if isinstance(task, TeacherTask)))))
    dtype = torch.float64 if wide else torch.float32
    block = None if shard is not None else block_of(plan, tasks, x, dtype)
    if block is not None:
        scratch = plan.scratch or not (student.in_memory and teachers.in_memory)
        few = block_sizes.compiled_rows(device, classes, n, plan.top_k, scratch)
    by = None if weights is None else slopes(plan, weights, dtype)
    side = partial(Side, shard=shard) if shard is not None else Side
    found = []
    with without_autocast(device.type):
        for start, stop in equal_blocks(n, many):
            student.make(start, stop)
            for first, last in equal_blocks(stop - start, theirs, start):
                teachers.make(first, last, few)
                for i, j in equal_blocks(last - first, few, first):
                    task = partial(task_of, tasks, teachers, i, j)
                    beside = _cut(by, i, j), [None if o is None else _cut(o, i, j) for o in off], _cut(nowhere, i, j)
                    rows = Few(student(i, j), task, *beside)
                    if block is None or j - i < 2:
                        found.append(uncompiled(plan, rows, side, gradients, i, j, dtype))
                    else:
                        found.append(compiled(block, plan, rows, gradients, i, j))
            if gradients is not None:
                gradients.block(start, stop)
    values = found[0] if len(found) == 1 else torch.cat([torch.empty(len(tasks), 0, device=device), *found], 1)
    return sized(plan, values).to(dtype), None if gradients is None else gradients.tensors()


def sized(plan: Plan, values: Tensor) -> Tensor:
    """Values `[tasks, rows]`, as large as they are to be."""
    return values if set(plan.sizes) == {1.0} else values * column_of(tuple(plan.sizes), values.dtype, values.device)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Autocast off, which takes a while where it isn't on."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def slopes(plan: Plan, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What each task's slope is multiplied with, `[tasks, rows, 1]` or `[tasks, 1, 1]`."""
    if set(plan.slopes) != {1.0}:
        weights = weights * column_of(tuple(plan.slopes), weights.dtype, weights.device)
    return weights.to(dtype).unsqueeze(-1)


@lru_cache(maxsize=64)
def column_of(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a column, made once: most steps have those of the one before. Nobody writes to it."""
    with torch.inference_mode(False):
        if on_cpu(device):
            return torch.tensor(numbers, dtype=dtype, device=device).unsqueeze(1)
        return torch.cat([torch.full((1, 1), x, dtype=dtype, device=device) for x in numbers])  # copied from no host


def uncompiled(
    plan: Plan, few: Few, side: MakeSide, gradients: Gradients | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Values of a few rows, whose gradients are taken."""
    place = None if gradients is None or gradients.in_place else gradients.place(start, stop)
    place = None if place is None or place.dtype != dtype else place
    few.z = few.z.to(dtype)
    values, gradient = compute(plan, few, side, place)
    if gradients is not None and gradient is not None and place is None:
        gradients.rows(start, stop, gradient)
    return values


def compiled(block: Block, plan: Plan, few: Few, gradients: Gradients | None, start: int, stop: int) -> Tensor:
    """The same by a compiled block, which writes the gradient where it belongs."""
    if gradients is None:
        return block(plan, few, None)
    place = gradients.place(start, stop)
    if place is not None:
        return block(plan, few, None if gradients.in_place else place)
    fresh = torch.empty_like(few.z)
    values = block(plan, few, fresh)
    gradients.rows(start, stop, fresh)
    return values


def task_of(tasks: Sequence[Task], teachers: Teachers, start: int, stop: int, k: int) -> Task:
    """Task k with what it has in rows start to stop."""
    task = tasks[k]
    if isinstance(task, LabelTask):
        labels = teachers(task.labels, start, stop, 1.0) if task.soft else task.labels[start:stop]
        return LabelTask(labels, task.smoothing, task.class_weights)
    rows = teachers(task.teacher, start, stop, task.temperature, task.teacher_classes)
    return task.with_rows(rows, None if task.labels is None else task.labels[start:stop])


def _cut(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Rows of `[..., rows, 1]`; of `[..., 1, 1]` the one that stands for all."""
    return x if x is None or x.shape[-2] in (1, stop - start) else x[..., start:stop, :]


def read_by_rows(tasks: Sequence[Task]) -> Iterator[Read]:
    """Teachers, and labels that stand at all positions as they do."""
    for task in tasks:
        if isinstance(task, TeacherTask):
            yield Read(task.teacher, task.temperature, task.teacher_classes)
        elif task.soft:
            yield Read(task.labels)


def switched_off(
    weights: Tensor | None, tasks: int, rows: int, nonzero: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """For each task the rows `[rows, 1]` of weight 0, and those where all tasks have it; None where there are none,
    if looking for some waits for nothing.
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
