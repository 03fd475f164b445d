"""The table of all losses: whatever `kdloss.divergences` and `kdloss.distances` export is in it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import oracles
import torch

from kdloss import distances, divergences

# Against the oracle on the same rounded inputs; 16-bit inputs are computed in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Loss:
    """A loss with its settings, and the oracle with the same ones."""

    name: str
    call: Any
    oracle: Any
    kind: str
    scale: float = 1.0

    @property
    def rounding(self) -> float:
        """What float32 may leave of a sum of probabilities, in units of the loss."""
        return 4 * torch.finfo(torch.float32).eps * self.scale

    def __str__(self) -> str:
        return self.name


def _table() -> list[Loss]:
    table = []
    for name in divergences.__all__:
        for temperature in (0.5, 1.0, 2.0, 10.0):
            settings = {"temperature": temperature}
            table.append(
                Loss(
                    f"{name}-T{temperature}",
                    partial(getattr(divergences, name), **settings),
                    partial(getattr(oracles, name), **settings),
                    "divergence",
                    temperature**2,
                )
            )
    for name in distances.__all__:
        table.append(Loss(name, getattr(distances, name), getattr(oracles, name), "distance"))
    return table


LOSSES = _table()
DIVERGENCES = [loss for loss in LOSSES if loss.kind == "divergence"]
DISTANCES = [loss for loss in LOSSES if loss.kind == "distance"]


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    """A student that requires gradient, and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    return student, (3 * torch.randn(*shape, generator=generator)).to(dtype)
