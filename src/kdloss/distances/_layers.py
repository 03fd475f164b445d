"""Layers of distances with parameters: computed in the features' own dtype, under autocast too."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Features `[..., D]` through a linear layer."""
    with _own_precision(x):
        return F.linear(x, *_weights(layer, x))


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Maps `[B, C, H, W]` through a convolution that keeps their size."""
    with _own_precision(x):
        return F.conv2d(x, *_weights(layer, x), padding="same")


def _own_precision(x: Tensor) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(x.device.type):  # meta
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _weights(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (p.to(x.dtype) for p in layer.parameters())
    return weight, bias
