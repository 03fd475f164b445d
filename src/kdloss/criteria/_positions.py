"""Which positions of a batch count, the same for every term of a loss."""

from dataclasses import dataclass

from torch import Size, Tensor

from kdloss import _checks
from kdloss.reduction import fill


@dataclass(frozen=True)
class Positions:
    """Where a batch counts: a position is what one label stands for.

    `shape` is the positions' shape as given. Under `causal` position t belongs to label t+1, so
    that the last one drops out; `keep` (True = counts) and `labels` are shifted already.
    """

    shape: Size
    keep: Tensor | None
    labels: Tensor | None
    causal: bool

    @classmethod
    def of(
        cls,
        shape: Size,
        labels: Tensor | None,
        mask: Tensor | None,
        *,
        causal: bool,
        ignore_index: int,
    ) -> "Positions":
        """The positions that neither `ignore_index` nor `mask` takes out."""
        if causal and len(shape) < 2:
            raise ValueError(
                f"causal=True shifts time, so it needs positions [batch, time], got {tuple(shape)}; "
                "write causal=False for a classifier"
            )
        if mask is not None:
            _checks.mask(mask, shape, "positions")
            mask = mask[:, 1:] if causal else mask
        if labels is None:
            return cls(shape, mask, None, causal)
        labels = labels[:, 1:] if causal else labels
        keep = labels != ignore_index
        keep = keep if mask is None else keep & mask
        return cls(shape, keep, fill(labels, keep), causal)

    def take(self, x: Tensor) -> Tensor:
        """A tensor `[*shape, ...]` at the positions, zeroed where they don't count."""
        return fill(x[:, :-1] if self.causal else x, self.keep)

    def examples(self, shape: Size) -> Tensor | None:
        """Which examples have a position that counts, as a mask `shape` that starts with them."""
        if self.keep is None:
            return None
        counted = self.keep.reshape(self.shape[0], -1).any(1)
        return counted.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def spread(self, values: Tensor) -> Tensor:
        """One value per example, given to each of the example's positions."""
        batch, *rest = self.shape
        if self.causal:
            rest[0] -= 1
        return values.reshape(batch, *[1] * len(rest)).expand(batch, *rest)
