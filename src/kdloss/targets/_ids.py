"""Class ids in the integer type in which they are stored."""

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1, torch.uint32: 2**32 - 1}
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}  # in as many bits


def of(indices: Tensor, vocabulary: int | None) -> Tensor:
    """The ids as int64, with -1 in an empty slot."""
    ids, largest = indices.long(), _LARGEST.get(indices.dtype)
    if largest is None or vocabulary is None or vocabulary > largest:
        return ids
    return ids.masked_fill(ids == largest, -1)


def picked(indices: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The ids that `pick` chooses, in their own type."""
    dtype = indices.dtype
    signed = _UNSIGNED.get(dtype)  # older torch picks from no others
    return pick(indices) if signed is None else pick(indices.view(signed)).view(dtype)
