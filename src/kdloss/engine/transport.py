r"""Entropic optimal transport between the class distributions of rows, debiased, in float64.

Potentials f, g are in units of epsilon: $f = -\log K (p\,e^g)$, $g = -\log K (q\,e^f)$ where K = exp(-cost / epsilon).
The largest exponent is subtracted before exp, so that all logits give finite rows. Each step is 1.5 times as long
(over-relaxation: Thibault et al. 2021, "Overrelaxed Sinkhorn-Knopp Algorithm for Regularized Optimal Transport",
arXiv:1711.01851), which reaches the same fixed point in far fewer steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from kdloss import _checks
from kdloss.engine.side import Side
from kdloss.reduction import widest

FURTHER = 1.5


def sinkhorn(
    q: Side, p: Side, *, cost: Tensor, epsilon: float = 0.1, iterations: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """W(q, p) - W(q, q) / 2 - W(p, p) / 2; slope q (f of W(q, p) - f of W(q, q))."""
    if q.shard is not None:
        raise ValueError("sinkhorn needs the whole vocabulary in one process; take forward_kl")
    check(q.probs, cost, epsilon, iterations)
    value, slope = debiased(q.log_probs(), p.log_probs(), cost, epsilon, iterations)
    return value.unsqueeze(-1), slope.to(q.probs.dtype), slope.sum(-1, keepdim=True)


def debiased(log_q: Tensor, log_p: Tensor, cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Values `[...]`, and slopes by log q `[..., V]`, which are the potentials' by the envelope theorem."""
    wide = widest(log_q.device)
    # Normalised again in the wide dtype: a difference of the masses would be transported, too.
    log_q, log_p = log_q.to(wide).log_softmax(-1), log_p.to(wide).log_softmax(-1)
    kernel = (cost.to(wide) / -epsilon).exp()
    # All three are solved in one batch, so that they are equal to the last bit where q is p.
    a, b = torch.stack([log_q, log_q, log_p]), torch.stack([log_p, log_q, log_p])
    f, g = _potentials(a, b, kernel, iterations)
    between, of_student, of_teacher = (epsilon * ((a.exp() * f).sum(-1) + (b.exp() * g).sum(-1))).unbind()
    slopes = epsilon * log_q.exp() * (f[0] - f[1])
    return between - (of_student + of_teacher) / 2, slopes


def _potentials(log_a: Tensor, log_b: Tensor, kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    f = g = torch.zeros_like(log_a)
    for _ in range(iterations):
        f = f.lerp(_transform(log_b + g, kernel), FURTHER)
        g = g.lerp(_transform(log_a + f, kernel), FURTHER)
    return _transform(log_b + g, kernel), g


def _transform(x: Tensor, kernel: Tensor) -> Tensor:
    """-log of K e^x."""
    top = x.detach().amax(-1, keepdim=True)
    return -(((x - top).exp() @ kernel).log() + top)


_looked_at: Any = WeakIdKeyDictionary()
"""The costs that were checked, with their version and the epsilon."""


def check(student: Tensor, cost: Tensor, epsilon: float, iterations: int) -> None:
    """Raise for costs that give no divergence; the numbers of a cost are checked once."""
    _checks.positive("epsilon", epsilon)
    _checks.whole_number("iterations", iterations)
    _checks.floating("cost", cost)
    classes = student.shape[-1]
    if cost.shape != (classes, classes):
        raise ValueError(
            f"cost has shape {tuple(cost.shape)}; logits of {classes} classes need {(classes, classes)}: the cost from "
            "each class to each"
        )
    _checks.same_place("cost", student, cost)
    if torch.compiler.is_compiling() or cost.is_meta or isinstance(cost, FakeTensor):
        return
    seen = cost._version, epsilon
    if _looked_at.get(cost) != seen:
        _look(cost.detach(), epsilon)
        _looked_at[cost] = seen


def _look(cost: Tensor, epsilon: float) -> None:
    cost = cost.cpu().double()
    size = max(cost.abs().max().item(), epsilon)
    if not cost.isfinite().all() or cost.diagonal().any() or (cost < 0).any():
        raise ValueError("cost must be finite and nowhere negative, and 0 from each class to itself")
    if (cost - cost.T).abs().max() > 1e-5 * size:
        raise ValueError("cost must be symmetric; write (cost + cost.T) / 2")
    if size > 300 * epsilon:
        raise ValueError(
            f"epsilon={epsilon!r} is too small for costs of up to {size:.3g}: write cost / cost.max(), or an epsilon "
            f"of {size / 20:.3g}"
        )
    least = torch.linalg.eigvalsh((cost / -epsilon).exp())[0].item()
    if least < -1e-6 * len(cost):
        raise ValueError(
            f"exp(-cost / epsilon) must be positive semi-definite, its least eigenvalue is {least:.3g}: the loss could "
            "be negative; take distances of class embeddings, torch.cdist(x, x) or their squares, or a smaller epsilon"
        )
