"""Trained layers inside distances, computed in the dtype of the features even under autocast."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdloss.distances._rows import own_precision


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a linear layer to features `[..., D]`."""
    with own_precision(x):
        return F.linear(x, *_weights(layer, x))


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Apply a convolution that keeps the size of maps `[B, C, H, W]`."""
    with own_precision(x):
        return F.conv2d(x, *_weights(layer, x), padding="same")


def _weights(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (p.to(x.dtype) for p in layer.parameters())
    return weight, bias
