"""Layers of distances with parameters: computed in the features' own dtype, under autocast too."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdloss.distances._rows import own_precision


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Features `[..., D]` through a linear layer."""
    with own_precision(x):
        return F.linear(x, *_weights(layer, x))


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Maps `[B, C, H, W]` through a convolution that keeps their size."""
    with own_precision(x):
        return F.conv2d(x, *_weights(layer, x), padding="same")


def _weights(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (p.to(x.dtype) for p in layer.parameters())
    return weight, bias
