"""A `Side` whose sums are computed piece by piece, so that the logits are read once for all sums."""

import torch
from torch import Tensor

from kdloss.engine.once import once
from kdloss.engine.side import LN2, PIECE, Side, finite


class PiecedSide(Side):
    """A `Side` for a compiler, which fuses all the work on one piece of the classes into one loop.

    Each piece is taken relative to its own largest logit, so that no separate sweep finds the row's largest; the
    pieces' sums are brought to the row's largest afterwards. Full rows `[r, V]` are computed for the gradient, and for
    forms that read them.
    """

    pieced = True

    def __init__(self, logits: Tensor, temperature: float | Tensor, like: float | None = None) -> None:
        self.logits, self.temperature, self.shard = logits, temperature, None
        self.like = temperature if like is None else like
        self.per_bit = 1 / (LN2 * temperature)
        split = pieces(logits)
        tops = [piece.amax(-1) for piece in split]
        self.top = finite(torch.cat(tops, -1).amax(-1, keepdim=True))
        self.falls = [((top - self.top) * self.per_bit).double() for top in tops]
        self.piece_bits = [(z - finite(top).unsqueeze(-1)) * self.per_bit for z, top in zip(split, tops, strict=True)]
        self.masses = [bits.exp2() for bits in self.piece_bits]
        self.sums = [mass.sum(-1).double() for mass in self.masses]
        self.total = self.gathered(self.sums)
        self.log_total = self.total.log()
        self.bits = (logits - self.top) * self.per_bit
        self.probs = self.bits.exp2() * once(self.total.reciprocal().to(logits.dtype))

    def gathered(self, sums: list[Tensor], power: float | Tensor = 1) -> Tensor:
        """The sum of the pieces' sums, each relative to its own largest logit, relative to the row's largest."""
        brought = [(fall * power).exp2() * x for fall, x in zip(self.falls, sums, strict=True)]
        return torch.cat(brought, -1).sum(-1, keepdim=True)

    def kl(self, other: Side) -> Tensor:
        """KL(self || other)."""
        if self.flat or other.flat or not isinstance(other, PiecedSide):
            return super().kl(other)
        found = []
        for i, (mass, size) in enumerate(zip(self.masses, self.sums, strict=True)):
            gap = torch.where(mass > 0, mass * (self.piece_bits[i] - other.piece_bits[i]), 0).sum(-1).double()
            found.append(gap + torch.where(size > 0, size * (self.falls[i] - other.falls[i]), 0))
        mean = self.gathered(found) / self.total
        return mean * LN2 + (other.log_total - self.log_total)

    def unsoftened(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unnormalised probabilities at T = 1, their sum, and the log of the sum of exponentials."""
        if self.like == 1:
            return super().unsoftened()
        if self.like == 2:
            total = self.gathered([m.square().sum(-1).double() for m in self.masses], 2) / self.total.square()
            return self.probs.square(), total, total.log() + 2 * self.log_total
        sums = [(bits * self.temperature).exp2().sum(-1).double() for bits in self.piece_bits]
        total = self.gathered(sums, self.temperature)
        return (self.bits * self.temperature).exp2(), total, total.log()


def pieces(rows: Tensor) -> list[Tensor]:
    """Split rows `[r, V]` into `[r, n, 128]` and the remainder `[r, 1, rest]`."""
    even = rows.shape[-1] // PIECE * PIECE
    found = [rows[:, :even].view(len(rows), even // PIECE, PIECE)] if even else []
    return [*found, rows[:, None, even:]] if even < rows.shape[-1] else found
