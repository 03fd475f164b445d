"""The work on a few rows, fused by torch.compile into two or three sweeps over the logits."""

import logging
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from kdloss.engine.kernel import Few
from kdloss.engine.pieces import PiecedSide
from kdloss.engine.plan import Plan
from kdloss.engine.rows import matmul_dtype
from kdloss.engine.side import Side
from kdloss.engine.switch import wanted
from kdloss.engine.task import LabelTask, Task
from kdloss.engine.traced import Rows, can_be_traced, compute_rows, structure
from kdloss.reduction import on_cpu
from kdloss.targets import LazyLogits

OPTIONS: dict[str, Any] = {f"realize_{what}_threshold": 1000 for what in ("reads", "opcount", "acc_reads")}
OPTIONS["triton.prefer_nd_tiling"] = True
OPTIONS["emulate_precision_casts"] = True
"""Rather computed twice than written and read. Numbers by row are read once for many classes. And no product is joined
with a sum, which would round one of two equal sides and not the other.
"""
_log = logging.getLogger("kdloss")


def block_of(plan: Plan, tasks: Sequence[Task], x: Tensor | LazyLogits, dtype: torch.dtype) -> "Block | None":
    """The plan's work on rows, compiled where it can be and is wanted."""
    if not wanted(x.device) or not can_be_traced(plan, tasks):
        return None
    if plan.top_k and on_cpu(x.device):  # where they take less time uncompiled
        return None
    given = matmul_dtype(x) if isinstance(x, LazyLogits) else x.dtype
    key = structure(plan, tasks), x.device, given, dtype, x.shape[-1]
    if key not in _blocks:
        _blocks[key] = Block(plan, tasks, dtype)
    return None if _blocks[key].given_up else _blocks[key]


class Block:
    """Values `[k, r]` of a few rows; their gradient is written to `out`, or over the logits where that is None.

    What is compiled is compared with what isn't in the first rows that it gets.
    """

    def __init__(self, plan: Plan, tasks: Sequence[Any], dtype: torch.dtype) -> None:
        groups = [replace(group, classes=None) for group in plan.groups]
        smoothing = [task.smoothing if isinstance(task, LabelTask) else None for task in tasks]
        few = {k: (tasks[k].teacher.tail, tasks[k].closed_form[0]) for k in plan.top_k}
        self._plain = partial(compute_rows, groups, smoothing, few, dtype)
        self._compiled: Callable[[Rows, Tensor | None], Tensor] | None = None
        self.given_up = False

    def __call__(self, plan: Plan, few: Few, out: Tensor | None) -> Tensor:
        """Those of a plan of the same structure."""
        rows = Rows.of(plan, few)
        try:
            if self._compiled is None:
                block = torch.compile(_with_code_of_its_own(self._plain, PiecedSide), options=_options())
                self._compiled = partial(_all_written, block)
                found = self._compared(self._compiled, rows, out)
                if found is not None:
                    return found
            elif not self.given_up:
                rows.mark(out)
                return self._compiled(rows, out)
        except Exception as error:  # whatever a compiler may raise
            self._give_up(f"it can't be compiled here: {str(error).strip()[:500]}")
        return self._plain(Side, rows, out)[0]

    def _compared(
        self, compiled: Callable[[Rows, Tensor | None], Tensor], rows: Rows, out: Tensor | None
    ) -> Tensor | None:
        """The values of the first rows there are, and None if some differ from those of the uncompiled work.

        All rows are compiled for, since the compiler tries out ways of doing it with what it is given first.
        """
        few = rows.first(8)
        exact, ours = torch.empty_like(few.z), torch.empty_like(rows.z) if out is None else out
        expected, _ = self._plain(Side, few, exact)
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


def _all_written(block: Callable[..., Any], rows: Rows, out: Tensor | None) -> Tensor:
    """Its values, once what is left is written: by the compiler it would be a sweep over all classes."""
    values, left = block(rows, out)
    if left is not None:
        (rows.z if out is None else out).scatter_(-1, *left)
    return cast("Tensor", values)


def _with_code_of_its_own(plain: Callable[..., Any], make: type[PiecedSide]) -> Callable[..., Any]:
    """A function that the compiler doesn't take for another one's sister, of which it compiles a few only."""

    def block(rows: Rows, out: Tensor | None) -> Any:
        return plain(make, rows, out)

    code = block.__code__.replace(co_name=f"block_{len(_blocks)}")
    return types.FunctionType(code, block.__globals__, code.co_name, None, block.__closure__)


def _options() -> dict[str, Any]:
    """Those that this PyTorch knows."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in OPTIONS.items() if name in known}


def _alike(a: Tensor, b: Tensor, rounding: float) -> bool:
    """The same numbers as a whole, and the same in what is no number."""
    a, b = a.double(), b.double()
    there = b.isfinite()
    gap = torch.where(there, a - b, 0).norm()
    others = torch.equal(a[~there].nan_to_num(7.0), b[~there].nan_to_num(7.0))
    return others and bool(gap <= rounding * torch.where(there, b, 0).norm() + 1e-6)
