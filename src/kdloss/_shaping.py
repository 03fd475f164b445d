"""What a model makes of its head's output: a scale, a soft cap, or something that only its full logits show."""

import math
from typing import Any

import torch
from torch import Tensor

from kdloss.targets import LazyLogits


def signal_like(z: Tensor) -> Tensor:
    """A test signal in place of the logits of one position: powers of two of all sizes, exact in every dtype."""
    exponents = torch.linspace(-20, 20, z.shape[-1], device=z.device).round()
    signal = torch.exp2(exponents).to(torch.float32 if z.device.type == "mps" else torch.float64)
    signal[..., 1::2] *= -1
    return signal.expand(z.shape)


def shaping(signal: Tensor, answer: Tensor) -> dict[str, Any] | None:
    """The scale and soft cap that turn the signal into the answer; None if these alone don't."""
    x, y = signal.flatten(), answer.flatten().to(signal.dtype)
    scale = (y[0] / x[0]).item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    softcap = None if (y[-1] / x[-1] / scale).item() > 0.5 else y[-1].abs().item()
    if not 0 < abs(scale) < math.inf or not (softcap is None or 0 < softcap < math.inf):
        return None
    found = {"softcap": softcap, "scale": scale}
    return found if _close(y, _shaped(x, found), 1e-5) else None


def is_shaped(x: Tensor, answer: Tensor, shaping: dict[str, Any]) -> bool:
    """Whether a model's answer to logits on a CPU is what this scale and soft cap make of them, up to rounding."""
    expected = _shaped(x, shaping)
    if answer.dtype == expected.dtype and torch.equal(answer, expected):
        return True
    digits = max(torch.finfo(x.dtype).eps, torch.finfo(answer.dtype).eps)
    return _close(answer.double(), _shaped(x.double(), shaping), 8 * digits)


def _shaped(x: Tensor, shaping: dict[str, Any]) -> Tensor:
    return LazyLogits(x.unsqueeze(-1), x.new_ones(1, 1), **shaping).shaped(x)


def _close(x: Tensor, y: Tensor, rtol: float) -> bool:
    return torch.allclose(x, y, rtol=rtol, atol=0.0, equal_nan=True)


def trained_since(node: Any, answer: Tensor) -> bool:
    """Whether a trained parameter takes part in what became of a node's output."""
    last, seen = answer.grad_fn, {node}
    todo = [last]
    if last is not None and last.name() == "_DDPSinkBackward":  # DDP's node for all that a model returns
        inside = [before for before, _ in last.next_functions]
        todo = inside[answer.output_nr : answer.output_nr + 1] or inside
    while todo:
        one = todo.pop()
        if one is None or one in seen:
            continue
        if hasattr(one, "variable"):
            return True
        seen.add(one)
        todo += [before for before, _ in one.next_functions]
    return False
