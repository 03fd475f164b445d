"""The work on a block of rows, fused by `torch.compile` into two or three sweeps over the logits."""

import logging
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from kdloss.engine.kernel import RowBlock
from kdloss.engine.pieces import PiecedSide
from kdloss.engine.plan import Plan
from kdloss.engine.rows import matmul_dtype
from kdloss.engine.side import Side
from kdloss.engine.switch import wanted
from kdloss.engine.task import LabelTask, Task
from kdloss.engine.traced import BlockInputs, can_be_traced, compute_block, structure
from kdloss.reduction import on_cpu
from kdloss.targets import LazyLogits

OPTIONS: dict[str, Any] = {f"realize_{what}_threshold": 1000 for what in ("reads", "opcount", "acc_reads")}
OPTIONS["triton.prefer_nd_tiling"] = True
OPTIONS["emulate_precision_casts"] = True
"""The thresholds: compute a number twice rather than write and read it. Tiling: read a number of a row once for many
classes. Casts: don't fuse a product with a sum, which would round one of two equal sides and not the other.
"""
_log = logging.getLogger("kdloss")


def compiled_block_of(
    plan: Plan, tasks: Sequence[Task], x: Tensor | LazyLogits, dtype: torch.dtype
) -> "CompiledBlock | None":
    """The plan's work on a block of rows, compiled; None where it can't be compiled or should not be."""
    if not wanted(x.device) or not can_be_traced(plan, tasks):
        return None
    if plan.top_k and on_cpu(x.device):  # uncompiled takes less time
        return None
    given = matmul_dtype(x) if isinstance(x, LazyLogits) else x.dtype
    key = structure(plan, tasks), x.device, given, dtype, x.shape[-1]
    if key not in _blocks:
        _blocks[key] = CompiledBlock(plan, tasks, dtype)
    return None if _blocks[key].given_up else _blocks[key]


class CompiledBlock:
    """Values `[k, r]` of a block of rows; the gradient is written to `out`, or over the logits where that is None.

    The first call compares the compiled work with the uncompiled work in a few rows.
    """

    def __init__(self, plan: Plan, tasks: Sequence[Any], dtype: torch.dtype) -> None:
        groups = [replace(group, classes=None) for group in plan.groups]
        smoothing = [task.smoothing if isinstance(task, LabelTask) else None for task in tasks]
        top_k = {k: (tasks[k].teacher.tail, tasks[k].closed_form[0]) for k in plan.top_k}
        self._plain = partial(compute_block, groups, smoothing, top_k, dtype)
        self._compiled: Callable[[BlockInputs, Tensor | None], Tensor] | None = None
        self.given_up = False

    def __call__(self, plan: Plan, rows: RowBlock, out: Tensor | None) -> Tensor:
        """The values for a plan of the same structure."""
        inputs = BlockInputs.of(plan, rows)
        try:
            if self._compiled is None:
                block = torch.compile(_with_code_of_its_own(self._plain, PiecedSide), options=_options())
                self._compiled = partial(_all_written, block)
                found = self._compared(self._compiled, inputs, out)
                if found is not None:
                    return found
            elif not self.given_up:
                inputs.mark(out)
                return self._compiled(inputs, out)
        except Exception as error:  # a compiler may raise anything
            self._give_up(f"it can't be compiled here: {str(error).strip()[:500]}")
        return self._plain(Side, inputs, out)[0]

    def _compared(
        self, compiled: Callable[[BlockInputs, Tensor | None], Tensor], inputs: BlockInputs, out: Tensor | None
    ) -> Tensor | None:
        """The values of the first block, or None if its first 8 rows differ from those of the uncompiled work.

        The compiler gets all rows of the block, since it tunes its kernels on its first inputs.
        """
        first = inputs.first(8)
        exact, ours = torch.empty_like(first.z), torch.empty_like(inputs.z) if out is None else out
        expected, _ = self._plain(Side, first, exact)
        inputs.mark(ours)
        values = compiled(inputs, ours)
        same = _close(values[:, :8], expected, 1e-4)
        rounding = max(1e-4, 2 * torch.finfo(ours.dtype).eps)
        if not (same and (inputs.weights is None or _close(ours[:8], exact, rounding))):
            self._give_up("compiled, it gives other numbers")
            return None
        if out is None and inputs.weights is not None:
            inputs.z.copy_(ours)
        return values

    def _give_up(self, why: str) -> None:
        self.given_up = True
        _log.warning("the work on logits is done uncompiled, since %s", why)


_blocks: dict[Hashable, CompiledBlock] = {}


def _all_written(block: Callable[..., Any], inputs: BlockInputs, out: Tensor | None) -> Tensor:
    """The block's values, after the rest of its gradient is written, which compiled would sweep over all classes."""
    values, left = block(inputs, out)
    if left is not None:
        (inputs.z if out is None else out).scatter_(-1, *left)
    return cast("Tensor", values)


def _with_code_of_its_own(plain: Callable[..., Any], make: type[PiecedSide]) -> Callable[..., Any]:
    """A function with its own code object: the compiler limits how often it compiles one code object."""

    def block(inputs: BlockInputs, out: Tensor | None) -> Any:
        return plain(make, inputs, out)

    code = block.__code__.replace(co_name=f"block_{len(_blocks)}")
    return types.FunctionType(code, block.__globals__, code.co_name, None, block.__closure__)


def _options() -> dict[str, Any]:
    """The options that this PyTorch knows."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in OPTIONS.items() if name in known}


def _close(a: Tensor, b: Tensor, rounding: float) -> bool:
    """Whether finite numbers agree up to rounding, by norm, and the infinite and NaN ones agree exactly."""
    a, b = a.double(), b.double()
    there = b.isfinite()
    gap = torch.where(there, a - b, 0).norm()
    others = torch.equal(a[~there].nan_to_num(7.0), b[~there].nan_to_num(7.0))
    return others and bool(gap <= rounding * torch.where(there, b, 0).norm() + 1e-6)
