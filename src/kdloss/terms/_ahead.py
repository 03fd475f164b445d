"""How many positions count, copied to the host while the models run."""

from typing import Any

import torch
from torch import Tensor

from kdloss.reduction import on_cpu


class Ahead:
    """The positions of a batch on an accelerator that labels and a mask keep, and their number.

    The number is copied to the host after the work that was queued on the accelerator when this object was made. If it
    is made before the forward passes, the loss can read the number without waiting for them.
    """

    def __init__(self, labels: Tensor, mask: Tensor | None, keep: Tensor, causal: bool) -> None:
        self.labels, self.mask, self.keep, self.causal = labels, mask, keep, causal
        self._number = keep.sum().to("cpu", non_blocking=True)  # into pinned memory
        kind = _module(keep.device)
        self._event = kind.Event()
        self._event.record(kind.current_stream(keep.device))

    @classmethod
    def of(cls, labels: Any, mask: Any, *, causal: bool, ignore_index: int) -> "Ahead | None":
        """The positions of a batch; None where the host can count them itself, or can't be told their number."""
        if torch.compiler.is_compiling() or type(labels) is not Tensor or labels.is_floating_point():
            return None
        if on_cpu(labels.device) or not _tells(labels.device):
            return None
        beside = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == labels.shape)
        if not beside or (causal and labels.ndim < 2):
            return None
        keep = (labels[:, 1:] if causal else labels) != ignore_index
        if mask is not None:
            keep = keep & (mask[:, 1:] if causal else mask)
        return cls(labels, mask, keep, causal)

    def fits(self, labels: Tensor, mask: Tensor | None, causal: bool) -> bool:
        """Whether these labels were counted, so that the number is at least that of the positions this mask keeps."""
        return self.labels is labels and self.causal == causal and (self.mask is mask or mask is not None)

    def number(self) -> int:
        """How many positions are kept."""
        return landed(self._event, self._number)


def landed(event: Any, number: Tensor) -> int:
    """The number copied to the host before this event. Waits for that copy only."""
    event.synchronize()
    return int(number)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _tells(device: torch.device) -> bool:
    """Whether a device has events, which say when a piece of work is done."""
    kind = _module(device)
    return hasattr(kind, "Event") and hasattr(kind, "current_stream")
