"""The task's own term: cross-entropy against labels."""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise


def cross_entropy(logits: Float[Tensor, "*batch classes"], labels: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy at every position, in float32 or better.

    $-\log \mathrm{softmax}(z)_{y}$

    Shapes: logits `[..., V]`, labels `[...]` of int64 class indices. Returns nats, `[...]`.

    Raises: TypeError for integer logits or labels that are not int64; ValueError for shapes or
    devices that differ.

    >>> import torch
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
    tensor([1.3863])
    """
    _checks.floating("logits", logits)
    _checks.labels(labels, logits)
    rows = precise(logits).reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, labels.reshape(-1), reduction="none").reshape(labels.shape)
