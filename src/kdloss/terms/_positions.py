"""Which positions of a batch count."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from kdloss import _checks
from kdloss.reduction import fill, on_cpu
from kdloss.targets.kinds import at
from kdloss.terms._ahead import Ahead


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that count; there is one label per position.

    `shape` is the shape of the positions as given. With `causal` position t belongs to label t+1, so the last position
    drops out; `keep` (True = counts) and `labels` are shifted already. `ahead`, for tensors on an accelerator, tells
    how many positions count at most.
    """

    shape: Size
    keep: Tensor | None
    labels: Tensor | None
    causal: bool
    ahead: Ahead | None = None

    @classmethod
    def of(
        cls,
        shape: Size,
        labels: Tensor | None,
        mask: Tensor | None,
        *,
        causal: bool,
        ignore_index: int,
        ahead: Ahead | None = None,
    ) -> "Positions":
        """The positions that neither `ignore_index` nor `mask` takes out.

        Labels that are not class indices (soft labels, numbers for a regression) take none out.
        """
        if causal and len(shape) < 2:
            raise ValueError(
                f"causal=True shifts time, so it needs positions [batch, time], got {tuple(shape)}; "
                "write causal=False for a classifier"
            )
        said = mask
        if mask is not None:
            _checks.mask(mask, shape, "positions")
            mask = mask[:, 1:] if causal else mask
        if labels is None or labels.is_floating_point():
            return cls(shape, None if mask is None or everywhere(mask) else mask, None, causal)
        labels, given = labels[:, 1:] if causal else labels, labels
        if ahead is not None and ahead.fits(given, said, causal):
            keep = ahead.keep if mask is None or ahead.mask is said else ahead.keep & mask
            return cls(shape, keep, labels * keep, causal, ahead)
        keep = labels != ignore_index
        keep = keep if mask is None else keep & mask
        return cls(shape, None, labels, causal) if everywhere(keep) else cls(shape, keep, labels * keep, causal)

    @property
    def numel(self) -> int:
        """How many positions there are, counted or not."""
        return self.shifted.numel()

    @property
    def shifted(self) -> Size:
        """The shape of one value per position; with `causal` without the last position."""
        if not self.causal:
            return self.shape
        batch, time, *rest = self.shape
        return Size((batch, max(time - 1, 0), *rest))

    def count(self) -> int | Tensor:
        """How many positions count."""
        return self.numel if self.keep is None else self.keep.sum()

    def take(self, x: Any) -> Any:
        """A tensor `[*shape, ...]`, or logits, at these positions, with zeros where a position doesn't count."""
        return at(x, lambda t: fill(t[:, :-1] if self.causal else t, self.keep))

    def fill(self, x: Tensor) -> Tensor:
        """A tensor that is at these positions already, with zeros where a position doesn't count."""
        return fill(x, self.keep)

    def counted(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The positions that count, as indices into the flattened `shifted` and into the flattened `shape`; None: all.

        With `causal` only the first can be None. On an accelerator the indices may include positions that don't count,
        since counting them would wait for the device: see `exact`.
        """
        places = None if self.keep is None else self._places(self.keep.reshape(-1))
        if not self.causal:
            return places, places
        every = torch.arange(self.numel, device=device) if places is None else places
        rest = self.shape[2:].numel()
        example = every.div(max(self.shifted[1:].numel(), 1), rounding_mode="floor")
        return places, every.add_(example, alpha=rest) if places is None else every.add(example, alpha=rest)

    def _places(self, keep: Tensor) -> Tensor | None:
        if on_cpu(keep.device):
            places = keep.nonzero().squeeze(1)
            return None if len(places) == self.numel else places
        most = self.numel if self.ahead is None else self.ahead.number()
        return None if most == self.numel else keep.byte().sort(descending=True, stable=True).indices[:most]

    @property
    def exact(self) -> bool:
        """Whether `counted` gives only positions that count."""
        told = self.ahead is not None and self.ahead.keep is self.keep
        return told or self.keep is None or on_cpu(self.keep.device)

    def back(self, values: Tensor, places: Tensor | None) -> Tensor:
        """Put the values of some positions back at their places, with 0 elsewhere."""
        if places is not None:
            values = values.new_zeros(self.numel).index_copy(0, places, values)
        return values.reshape(self.shifted)

    def examples(self, shape: Size) -> Tensor | None:
        """Which examples have a position that counts, as a mask of this `shape`, whose first axis is the batch."""
        if self.keep is None:
            return None
        counted = self.keep.reshape(self.shape[0], self.keep.shape[1:].numel()).any(1)
        return counted.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def spread(self, values: Tensor) -> Tensor:
        """Expand one value per example to all positions of the example."""
        shape = self.shifted
        return values.reshape(shape[0], *[1] * (len(shape) - 1)).expand(shape)


def everywhere(keep: Tensor) -> bool:
    """Whether a mask is known to be True everywhere; looks only if that waits for no device and breaks no graph."""
    if type(keep) is not Tensor or not on_cpu(keep.device) or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is None and bool(keep.all())
