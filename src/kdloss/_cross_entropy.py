"""Cross-entropy with labels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise


def cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int64[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    smoothing: float = 0.0,
    weight: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy at every position, in float32 or better.

    $-\sum_c w_c \left((1-\epsilon)\,y_c + \frac{\epsilon}{C}\right) \log \mathrm{softmax}(z)_c$ with y
    the labels' probabilities (for class labels, 1 at the label), $\epsilon$ = `smoothing` and w = `weight`, 1
    by default: for classes and $\epsilon = 0$ it is $-w_y \log \mathrm{softmax}(z)_y$. Values are those of
    `torch.nn.functional.cross_entropy` with reduction="none", except that a class with a target of 0 adds
    nothing even if its logit is -inf.

    Shapes: logits `[..., C]`; labels `[...]`, int64 class indices, or `[..., C]`, floating point
    probabilities; weight `[C]`. Returns nats, `[...]`.

    Raises: TypeError for integer logits or labels that are neither int64 nor floating point; ValueError for
    shapes or devices that differ, or a smoothing outside 0 and 1.

    >>> import torch
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # log 4
    tensor([1.3863])

    Smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
    arXiv:1512.00567.
    """
    _checks.floating("logits", logits)
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    _checks.soft_labels(labels, logits) if soft else _checks.labels(labels, logits)
    _checks.target_options(smoothing, weight, logits)
    if not soft and smoothing == 0 and weight is None:
        rows = precise(logits).reshape(-1, logits.shape[-1])
        return F.cross_entropy(rows, labels.reshape(-1), reduction="none").reshape(labels.shape)
    log_q = precise(logits).log_softmax(-1)
    weight = None if weight is None else weight.to(log_q.dtype)
    if soft:
        target = labels.to(log_q.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
        return -_weighted(target if weight is None else target * weight, log_q)
    found = log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if weight is not None:
        found = _times(weight[labels], found)
    if smoothing == 0:
        return -found
    everywhere = log_q.sum(-1) if weight is None else _weighted(weight, log_q)
    return -_times(torch.full_like(found, 1 - smoothing), found) - smoothing / logits.shape[-1] * everywhere


def _weighted(target: Tensor, log_q: Tensor) -> Tensor:
    return _times(target, log_q).sum(-1)


def _times(weight: Tensor, log_q: Tensor) -> Tensor:
    """The product, 0 where the weight is 0, also if the log-probability is -inf."""
    return torch.where(weight == 0, 0, weight * log_q.masked_fill(weight == 0, 0))
