"""Make a compiler compute a number of a row once, and not again for every class of the row."""

import torch
from torch import Tensor


@torch.library.custom_op("kdloss::once", mutates_args=())
def _once(x: Tensor) -> Tensor:
    return x.clone()


@_once.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def once(x: Tensor) -> Tensor:
    """The same numbers; code compiled for an accelerator reads them from memory.

    Otherwise the kernel would repeat float64 divisions and logarithms of a row's sums in every entry. On CPUs the
    compiler moves them out of the loop by itself.
    """
    return x if x.device.type == "cpu" or not torch.compiler.is_compiling() else _once(x)


def behind(x: Tensor) -> Tensor:
    """The same numbers, hidden from the compiler, on any device.

    Otherwise the compiler inlines them again at every use, and at uses of uses, which takes minutes.
    """
    return _once(x) if torch.compiler.is_compiling() else x
