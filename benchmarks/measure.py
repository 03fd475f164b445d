"""Measure time and memory of a training step, and format them as rows of a table."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdloss

Step = Callable[[], Any]
SECONDS = 2.0  # CPU time spent on measuring one pair
HEADER = "| | conditions | ours | ratio, or number | goal |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A row of the table: what was measured, the conditions, the ratio, the goal. Missed goals are in bold."""

    what: str
    conditions: str
    ratio: float
    goal: float | None = None
    ours: str = ""
    least: bool = False  # the goal is a lower bound

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"{'≥' if self.least else '≤'} {self.goal:.3g}"
        missed = self.goal is not None and (self.ratio < self.goal if self.least else self.ratio > self.goal)
        ratio = f"**{self.ratio:.3g}**" if missed else f"{self.ratio:.3g}"
        return f"| {self.what} | {self.conditions} | {self.ours} | {ratio} | {goal} |"


def engine(compiled: bool) -> None:
    """Turn the engine's compiled blocks on or off. Only this function knows the switch."""
    os.environ["KDLOSS_COMPILE"] = "1" if compiled else "0"
    switch = getattr(kdloss, "set_compile", None)
    if switch is not None:
        switch(compiled)


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices. Without such instructions a product takes seconds, for any loss."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def engine_as(compiled: bool) -> Iterator[str]:
    """Run the engine compiled or uncompiled; yield the word for the conditions."""
    engine(compiled)
    torch._dynamo.reset()  # compile every recipe for its own shapes, not for dynamic ones
    yield "compiled" if compiled else "uncompiled"
    engine(False)


def paired(ours: Step, other: Step, rounds: int = 15) -> tuple[float, float]:
    """The median of ours / other in CPU time, and ours in ms. Both run in turn, at least three times, after warm-up."""
    warm_up(ours, other)
    ratios, mine, until = [], [], time.process_time() + SECONDS
    while len(ratios) < 3 or (len(ratios) < rounds and time.process_time() < until):
        times = {}
        for step in (ours, other) if len(ratios) % 2 else (other, ours):
            start = time.process_time()
            step()
            times[step] = time.process_time() - start
        ratios.append(times[ours] / times[other])
        mine.append(times[ours])
    return statistics.median(ratios), 1e3 * statistics.median(mine)


def warm_up(*steps: Step) -> None:
    """Run the steps twice; if the allocator keeps memory, until they take no new pages, at most ten times."""
    for k in range(10 if os.environ.get("MALLOC_MMAP_MAX_") == "0" else 2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for step in steps:
            step()
        if k and resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100:
            break


def peak(step: Step) -> int:
    """The peak memory of a step in bytes, above what was allocated before, from the events of PyTorch's allocator.

    So temporaries inside operators and the buffers of compiled kernels count, too. The first run is not measured.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def leaves(given: Sequence[Any]) -> list[Tensor]:
    """All tensors in logits of any kind, and in lists and objects that hold them."""
    found = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += leaves(x)
        elif hasattr(x, "__dict__"):
            found += leaves(list(vars(x).values()))
    return found


def backward(loss: Callable[..., Tensor], *given: Any) -> Step:
    """A step that computes the value and the gradients, and drops the gradients."""
    trained = [t for t in leaves(given) if t.requires_grad]

    def step() -> None:
        loss(*given).backward()
        for tensor in trained:
            tensor.grad = None

    return step


def anew(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss that overwrites the student's logits, which are written again before each call."""

    def over(student: Tensor, *rest: Any) -> Tensor:
        student.detach().normal_()
        return loss(student, *rest)

    return over


def time_row(what: str, conditions: str, ours: Step, other: Step, goal: float | None = None) -> Row:
    """A row for the time of ours against the other."""
    ratio, ms = paired(ours, other)
    return Row(f"{what}: time", conditions, ratio, goal, f"{ms:.3g} ms")


def peak_row(what: str, conditions: str, ours: Step, other: Step | int, goal: float | None = None) -> Row:
    """A row for the peak memory of ours against the other, or against a number of bytes."""
    mine = peak(ours)
    ratio = mine / (other if isinstance(other, int) else peak(other))
    return Row(f"{what}: peak", conditions, ratio, goal, f"{mine / 2**20:.3g} MiB")
