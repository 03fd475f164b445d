"""The work on a few rows, fused by torch.compile into two or three sweeps over the logits."""

import logging
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss.engine.kernel import Few, compute
from kdloss.engine.pieces import PiecedSide
from kdloss.engine.plan import Group, Plan
from kdloss.engine.rows import identity, matmul_dtype
from kdloss.engine.side import Side
from kdloss.engine.switch import wanted
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.reduction import widest
from kdloss.targets import LazyLogits
from kdloss.targets.kinds import Classes

OPTIONS: dict[str, Any] = {f"realize_{what}_threshold": 1000 for what in ("reads", "opcount", "acc_reads")}
OPTIONS["triton.prefer_nd_tiling"] = True
OPTIONS["emulate_precision_casts"] = True
"""Rather computed twice than written and read. Numbers by row are read once for many classes. And no product is joined
with a sum, which would round one of two equal sides and not the other.
"""
_log = logging.getLogger("kdloss")


class Rows(NamedTuple):
    """What a few rows bring along: the student's logits; by task its teacher's logits or its labels, and weights of
    classes; by group its temperature and classes; by task what the slope is multiplied with and where it is off.
    """

    z: Tensor
    beside: list[Tensor | None]
    class_weights: list[Tensor | None]
    temperatures: list[Tensor | float]
    classes: list[Classes]
    weights: Tensor | None
    off: list[Tensor | None]
    nowhere: Tensor | None

    @classmethod
    def of(cls, plan: Plan, few: Few) -> "Rows":
        """Those that the plan's tasks read."""
        tasks = {k: few.task(k) for group in plan.groups for k in (*group.labels, *group.closed)}
        found: list[Any] = [tasks.get(k) for k in range(len(few.off))]
        beside = [None if t is None else t.labels if isinstance(t, LabelTask) else t.teacher for t in found]
        class_weights = [t.class_weights if isinstance(t, LabelTask) else None for t in found]
        temperatures = [_passed(group.temperature, few.z.device) for group in plan.groups]
        classes = [group.classes for group in plan.groups]
        return cls(few.z, beside, class_weights, temperatures, classes, few.weights, list(few.off), few.nowhere)

    def first(self, rows: int) -> "Rows":
        """Some of them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:rows]

        beside, off = [cut(x) for x in self.beside], [cut(x) for x in self.off]
        weights = None if self.weights is None else self.weights[:, :rows]
        return self._replace(z=self.z[:rows], beside=beside, weights=weights, off=off, nowhere=cut(self.nowhere))

    def mark(self, out: Tensor | None) -> None:
        """Tell the compiler that there will be other numbers of rows."""
        for tensor in (self.z, out, self.nowhere, *self.beside, *self.off):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self.weights is not None and self.weights.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(self.weights, 1)


def block_of(plan: Plan, tasks: Sequence[Task], x: Tensor | LazyLogits, dtype: torch.dtype) -> "Block | None":
    """The plan's work on rows, compiled where it can be and is wanted."""
    if plan.top_k or plan.by_autograd or not wanted(x.device) or any(map(_by_tensors, plan.groups)):
        return None
    given = matmul_dtype(x) if isinstance(x, LazyLogits) else x.dtype
    key = _structure(plan, tasks), x.device, given, dtype, x.shape[-1]
    if key not in _blocks:
        smoothing = [task.smoothing if isinstance(task, LabelTask) else None for task in tasks]
        _blocks[key] = Block(plan, smoothing, dtype)
    return None if _blocks[key].given_up else _blocks[key]


class Block:
    """Values `[k, r]` of a few rows; their gradient is written to `out`, or over the logits where that is None.

    What is compiled is compared with what isn't in the first rows that it gets.
    """

    def __init__(self, plan: Plan, smoothing: Sequence[float | None], dtype: torch.dtype) -> None:
        groups = [replace(group, classes=None) for group in plan.groups]
        self._plain = partial(_compute, groups, smoothing, dtype)
        self._compiled: Callable[[Rows, Tensor | None], Tensor] | None = None
        self.given_up = False

    def __call__(self, plan: Plan, few: Few, out: Tensor | None) -> Tensor:
        """Those of a plan of the same structure."""
        rows = Rows.of(plan, few)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(_with_code_of_its_own(self._plain, PiecedSide), options=_options())
                found = self._compared(self._compiled, rows, out)
                if found is not None:
                    return found
            elif not self.given_up:
                rows.mark(out)
                return self._compiled(rows, out)
        except Exception as error:  # whatever a compiler may raise
            self._give_up(f"it can't be compiled here: {str(error).strip()[:500]}")
        return self._plain(Side, rows, out)

    def _compared(
        self, compiled: Callable[[Rows, Tensor | None], Tensor], rows: Rows, out: Tensor | None
    ) -> Tensor | None:
        """The values of the first rows there are, and None if some differ from those of the uncompiled work.

        All rows are compiled for, since the compiler tries out ways of doing it with what it is given first.
        """
        few = rows.first(8)
        exact, ours = torch.empty_like(few.z), torch.empty_like(rows.z) if out is None else out
        expected = self._plain(Side, few, exact)
        rows.mark(ours)
        values = compiled(rows, ours)
        same = _alike(values[:, :8], expected, 1e-4)
        rounding = max(1e-4, 2 * torch.finfo(ours.dtype).eps)
        if not (same and (rows.weights is None or _alike(ours[:8], exact, rounding))):
            self._give_up("compiled, it gives other numbers")
            return None
        if out is None and rows.weights is not None:
            rows.z.copy_(ours)
        return values

    def _give_up(self, why: str) -> None:
        self.given_up = True
        _log.warning("the work on logits is done uncompiled, since %s", why)


_blocks: dict[Hashable, Block] = {}


def _compute(
    groups: Sequence[Group],
    smoothing: Sequence[float | None],
    dtype: torch.dtype,
    make: type[Side] | type[PiecedSide],
    rows: Rows,
    out: Tensor | None,
) -> Tensor:
    """What is compiled."""

    def side(logits: Tensor, temperature: Any) -> Side:
        if isinstance(temperature, float):  # a teacher's own
            return make(logits, temperature)
        return make(logits, rows.temperatures[temperature], like=_like(groups[temperature].temperature))

    z = rows.z.to(dtype)
    tasks: list[Any] = [
        _Teacher(x) if smooth is None or x is None else LabelTask(x, smooth, w)
        for x, w, smooth in zip(rows.beside, rows.class_weights, smoothing, strict=True)
    ]
    here = [Group(n, rows.classes[n], group.labels, group.closed, group.own) for n, group in enumerate(groups)]
    values, gradient = compute(Plan(here), Few(z, tasks.__getitem__, rows.weights, rows.off, rows.nowhere), side)
    if gradient is not None:
        (rows.z if out is None else out).copy_(gradient)
    return values.to(dtype)


class _Teacher(NamedTuple):
    teacher: Tensor | None


def _with_code_of_its_own(plain: Callable[..., Tensor], make: type[PiecedSide]) -> Callable[..., Tensor]:
    """A function that the compiler doesn't take for another one's sister, of which it compiles a few only."""

    def block(rows: Rows, out: Tensor | None) -> Tensor:
        return plain(make, rows, out)

    code = block.__code__.replace(co_name=f"block_{len(_blocks)}")
    return types.FunctionType(code, block.__globals__, code.co_name, None, block.__closure__)


def _options() -> dict[str, Any]:
    """Those that this PyTorch knows."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in OPTIONS.items() if name in known}


def _structure(plan: Plan, tasks: Sequence[Task]) -> Hashable:
    """What is compiled in: by group the tasks and forms."""
    of_tasks = tuple(
        (t.soft, t.smoothing, t.class_weights is None) if isinstance(t, LabelTask) else _form(t) for t in tasks
    )
    groups = tuple(
        (
            _like(group.temperature),
            "some" if isinstance(group.classes, Tensor) else identity(group.classes),
            tuple(group.labels),
            tuple((teacher, tuple(c.k for c in closed)) for teacher, closed in group.closed.items()),
            tuple(group.own.items()),
        )
        for group in plan.groups
    )
    return of_tasks, groups


def _like(temperature: float) -> float:
    """Temperatures with a way of their own are 1, 2 and those above 8; the others are computed alike."""
    return temperature if temperature in (1, 2) else 16.0 if temperature > 8 else 4.0


def _passed(temperature: float, device: torch.device) -> float | Tensor:
    """A number that may change from step to step, without being compiled anew."""
    return temperature if temperature in (1, 2) else torch.full((), temperature, dtype=widest(device), device=device)


def _by_tensors(group: Group) -> bool:
    """Whether a form has tensors among its options, which would be compiled in."""
    forms: list[Any] = [c.form for closed in group.closed.values() for c in closed]
    return any(isinstance(option, Tensor) for form in forms for option in form.keywords.values())


def _form(task: TeacherTask) -> Hashable:
    assert task.closed_form is not None
    form: Any = task.closed_form[0]
    return form.func, tuple(sorted((name, identity(value)) for name, value in form.keywords.items()))


def _alike(a: Tensor, b: Tensor, rounding: float) -> bool:
    """The same numbers as a whole, and the same in what is no number."""
    a, b = a.double(), b.double()
    there = b.isfinite()
    gap = torch.where(there, a - b, 0).norm()
    others = torch.equal(a[~there].nan_to_num(7.0), b[~there].nan_to_num(7.0))
    return others and bool(gap <= rounding * torch.where(there, b, 0).norm() + 1e-6)
