"""All rows, a block at a time: values at every position, and gradients of the student's tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdloss.engine.gradients import Gradients, OfHead, OfLogits
from kdloss.engine.kernel import Scratch, Terms, Weights, by_autograd, by_closed_form
from kdloss.engine.rows import Rows
from kdloss.engine.task import Task, block_rows, scratch_rows
from kdloss.engine.top_k import by_top_k
from kdloss.targets import LazyLogits, Logits, Mixture, Shard, ShardedLogits, TopKLogits

Student = Tensor | LazyLogits
Kernel = Callable[..., tuple[Terms, Tensor | None]]


@dataclass(frozen=True)
class Problem:
    """A task and what it is to be done on: `labels` and `rows` are of the positions in `index`."""

    task: Task
    teacher: Logits | None
    labels: Tensor | None
    index: Tensor | None
    rows: int
    overwrite: bool = False
    shard: Shard | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        student: Student | ShardedLogits,
        teacher: Logits | None,
        labels: Tensor | None,
        index: Tensor | None,
        rows: int,
        overwrite: bool = False,
    ) -> "tuple[Problem, Student]":
        """The problem, and the student's part in it in this process."""
        if not isinstance(student, ShardedLogits):
            return cls(task, teacher, labels, index, rows, overwrite), student
        if isinstance(teacher, ShardedLogits):
            teacher = teacher.local
        return cls(task, teacher, labels, index, rows, overwrite, student.shard), student.local


def run(problem: Problem, x: Student, weights: Weights | None) -> tuple[Tensor, Tensor, Gradients | None]:
    """Cross-entropy and divergence at every row (0 for a term that is not there), and gradients."""
    task, n, classes, device = problem.task, problem.rows, x.shape[-1], x.device
    student = Rows(x, problem.index, task.temperature)
    teacher = None if problem.teacher is None else Rows(problem.teacher, problem.index, task.temperature)
    gradients: Gradients | None = None
    if weights is not None:
        gradients = (
            OfHead(x, student, problem.shard) if isinstance(x, LazyLogits) else OfLogits(x, student, problem.overwrite)
        )
    kernel, many = choose(problem), block_rows(classes)
    few = scratch_rows(device, classes) * (1 if kernel is by_closed_form else 2)
    if problem.shard is not None:  # every process cuts alike, and seldom: collectives
        kernel = partial(by_closed_form, shard=problem.shard)
        few = many = block_rows(max(problem.shard.sizes))
    lazy = any(isinstance(side, LazyLogits | Mixture) for side in (x, problem.teacher))
    dtype = torch.float64 if _dtype(x) == torch.float64 else torch.float32
    scratch = Scratch(min(few, n), classes, dtype, device)
    values = torch.zeros(2, n, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for start, stop in equal_blocks(n, many if lazy else n):
            student.make(start, stop)
            if teacher is not None:
                teacher.make(start, stop)
            for i in range(start, stop, few):
                j = min(i + few, stop)
                z, t = student(i, j), None if teacher is None else teacher(i, j)
                labels = None if problem.labels is None else problem.labels[i:j]
                part = None if weights is None else weights.rows(i, j)
                terms, gradient = kernel(task, z, t, labels, part, scratch)
                for row, value in zip(values, terms, strict=True):
                    if value is not None:
                        row[i:j] = value
                if gradients is not None and gradient is not None:
                    gradients.rows(i, j, gradient)
            if gradients is not None:
                gradients.block(start, stop)
    return values[0], values[1], gradients


def choose(problem: Problem) -> Kernel:
    """The fastest way to compute this."""
    task, teacher = problem.task, problem.teacher
    if problem.shard is not None and teacher is not None and task.closed_form is None:
        raise ValueError(
            "over a sharded vocabulary there are cross-entropy and the divergences with a closed form: "
            "forward, reverse, symmetric and skewed KL, JSD and total variation, of logits or LazyLogits"
        )
    if task.vocabulary is not None and teacher is not None:
        return by_autograd
    if isinstance(teacher, TopKLogits):
        return by_autograd if teacher.tail == "uniform" else by_top_k
    return by_closed_form if teacher is None or task.closed_form is not None else by_autograd


def equal_blocks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most so many rows, of equal size but for one row."""
    blocks = -(-rows // most) if rows else 0
    for k in range(blocks):
        yield rows * k // blocks, rows * (k + 1) // blocks


def _dtype(x: Student) -> torch.dtype:
    return x.hidden.dtype if isinstance(x, LazyLogits) else x.dtype
