"""How many positions count, told to the host while the models run."""

from typing import Any

import torch
from torch import Tensor

from kdloss.reduction import on_cpu


class Ahead:
    """The positions that labels, and a mask beside them, leave of a batch on an accelerator; and how many these are.

    The number is copied to the host behind what the accelerator had to do when this was made. Made before the forward
    passes it is there when a loss asks for it, which then waits for none of them.
    """

    def __init__(self, labels: Tensor, mask: Tensor | None, keep: Tensor, causal: bool) -> None:
        self.labels, self.mask, self.keep, self.causal = labels, mask, keep, causal
        self._number = keep.sum().to("cpu", non_blocking=True)  # into pinned memory
        kind = _module(keep.device)
        self._event = kind.Event()
        self._event.record(kind.current_stream(keep.device))

    @classmethod
    def of(cls, labels: Any, mask: Any, *, causal: bool, ignore_index: int) -> "Ahead | None":
        """Those of a batch; None where nothing has to be told, or can't be."""
        if torch.compiler.is_compiling() or type(labels) is not Tensor or labels.is_floating_point():
            return None
        beside = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == labels.shape)
        if on_cpu(labels.device) or not _tells(labels.device) or not beside or (causal and labels.ndim < 2):
            return None
        keep = (labels[:, 1:] if causal else labels) != ignore_index
        if mask is not None:
            keep = keep & (mask[:, 1:] if causal else mask)
        return cls(labels, mask, keep, causal)

    def fits(self, labels: Tensor, mask: Tensor | None, causal: bool) -> bool:
        """Whether these labels were counted, and no more than this mask of them."""
        return self.labels is labels and self.causal == causal and (self.mask is mask or mask is not None)

    def number(self) -> int:
        """How many positions are kept."""
        return landed(self._event, self._number)


def landed(event: Any, number: Tensor) -> int:
    """What was copied to the host when this event was. Waits for that copy alone."""
    event.synchronize()
    return int(number)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _tells(device: torch.device) -> bool:
    """Whether a device says when it is done with something."""
    kind = _module(device)
    return hasattr(kind, "Event") and hasattr(kind, "current_stream")
