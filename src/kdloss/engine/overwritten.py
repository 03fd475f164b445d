"""Logits that `overwrite_logits=True` replaced by their gradient: they must not be read as logits again."""

import torch
from torch import Tensor, nn

from kdloss.targets import Mixture
from kdloss.targets.kinds import AnyLogits

_any: list[bool] = []  # without any the check costs nothing
_MARK = "_kdloss_overwritten"


def mark(logits: Tensor) -> None:
    """Note on the memory of these logits, which views share, that it holds a gradient until it is written again."""
    first = logits.storage_offset()
    stop = first + (logits.numel() if logits.is_contiguous() else 1)
    setattr(logits.untyped_storage(), _MARK, (logits._version, range(first, stop)))
    _any[:] = [True]


def refuse(student: AnyLogits, *teachers: AnyLogits) -> None:
    """Raise for logits, or a view of them, that were overwritten and not written since."""
    if not _any or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return  # traced and transformed tensors have no memory
    for whose, each in (("student", [student]), ("teacher", teachers)):
        for x in each:
            if any(map(_overwritten, x.teachers if isinstance(x, Mixture) else [x])):
                raise RuntimeError(
                    f"the {whose}'s logits were overwritten with their gradient, since overwrite_logits=True, and "
                    "can't be used again; compute all terms in one criterion, run the model again, or write "
                    "overwrite_logits=False"
                )


def _overwritten(x: AnyLogits) -> bool:
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return False
    version, there = getattr(x.untyped_storage(), _MARK, (None, ()))
    return x.storage_offset() in there and not x.is_inference() and x._version == version
