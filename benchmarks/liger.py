"""Liger's losses with the signature of ours; None if liger-kernel is not installed or has no such loss on the device.

Liger's beta is 0 for KL(teacher ‖ student) and 1 for KL(student ‖ teacher). Liger never multiplies by T².
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def here() -> bool:
    """Whether liger-kernel is installed."""
    return find_spec("liger_kernel") is not None


def fused_linear(beta: float, alpha: float, temperature: float, factor: float, chunk: int) -> Loss | None:
    """Alpha times CE plus (1 - alpha) times factor times its JSD of hidden states and heads, in compiled chunks."""
    if not here():
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(alpha, (1 - alpha) * factor, beta=beta, temperature=temperature, chunk_size=chunk)

    def of(student: Any, teacher: Any, labels: Tensor) -> Tensor:
        value: Tensor = loss(student.hidden, student.weight, teacher.hidden, teacher.weight, labels)
        return value

    return of


def kernel(beta: float, alpha: float, temperature: float, factor: float, device: str) -> Loss | None:
    """The same on logits: its Triton kernel, which takes log-softmaxes, and PyTorch's cross-entropy."""
    if not here() or device == "cpu":
        return None
    from liger_kernel.transformers import LigerJSD

    jsd = LigerJSD(beta)

    def of(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        value = factor * jsd(*((x / temperature).log_softmax(-1) for x in (student, teacher)))
        total: Tensor = alpha * F.cross_entropy(student, labels) + (1 - alpha) * value if alpha else value
        return total

    return of
