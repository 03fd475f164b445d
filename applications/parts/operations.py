"""The floating-point operations of training, counted: the same number on every machine, however busy it is."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = Sequence[int]


def product(total: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Total + a @ b: the sum is not counted, as PyTorch does not."""
    return 2 * math.prod(a) * b[-1]


def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores, then averages of values. What a mask leaves out counts, too, as in PyTorch's own formulas."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores once more, then the gradients of probabilities, values, queries and keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


MISSING = {  # what PyTorch's own counter passes over: attention on a CPU, and products that are added in place
    aten.addmm: product,
    aten.addmm_: product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention; a product and a sum are two."""
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        work()
    return counter.get_total_flops()


def of_training(step: Callable[[Mapping[str, Any]], Any], batches: Iterable[Mapping[str, Any]]) -> float:
    """Floating-point operations of a forward and backward pass on each of these batches, in 10^12.

    One batch of each shape is run and counted: packed blocks of text have two shapes at most. Clipping and the
    optimizer have no products.
    """
    known: dict[Shape, int] = {}
    total = 0
    for batch in batches:
        shape = batch["input_ids"].shape
        if not known:
            step(batch)  # a `Distiller` measures the student's own loss at first, which is no part of a step
        if shape not in known:
            known[shape] = counted(lambda: step(batch))  # noqa: B023 (called at once)
        total += known[shape]
    return total / 1e12
