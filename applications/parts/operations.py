"""Count the floating-point operations of training; unlike time, the count is the same on every machine."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = Sequence[int]


def product(total: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """`total + a @ b`. The sum does not count, as in PyTorch's own formulas."""
    return 2 * math.prod(a) * b[-1]


def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, then weighted sums of values. Masked positions count, too, as in PyTorch's own formulas."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The scores again, then the gradients of probabilities, values, queries and keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


MISSING = {  # PyTorch's own counter skips attention on a CPU and products that are added in place
    aten.addmm: product,
    aten.addmm_: product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        work()
    return counter.get_total_flops()


def of_training(step: Callable[[Mapping[str, Any]], Any], batches: Iterable[Mapping[str, Any]]) -> float:
    """Floating-point operations in 10^12 of a forward and backward pass on each of these batches.

    Only one batch of each shape is run and counted: packed blocks of text have at most two shapes. Clipping and the
    optimizer have no matrix products.
    """
    known: dict[Shape, int] = {}
    total = 0
    for batch in batches:
        shape = batch["input_ids"].shape
        if not known:
            step(batch)  # the first call of a `Distiller` also measures the student's own loss; not counted
        if shape not in known:
            known[shape] = counted(lambda: step(batch))  # noqa: B023 (called at once)
        total += known[shape]
    return total / 1e12
