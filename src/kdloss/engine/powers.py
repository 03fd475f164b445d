r"""Powers of probabilities whose small differences keep their digits: the alpha-beta family.

All take log q, log p and `gap` = log q - log p with its own digits. With $\lambda = \alpha + \beta$ the alpha-beta
divergence is the sum of $g^2 \exp[\lambda \log p,\ \alpha \log p + \beta \log q,\ \lambda \log q]$, g the gap and
exp[a, b, c] the second divided difference of exp. That is never negative, has every limit (alpha, beta or lambda 0)
without a case of its own, and is the difference of two first ones by the outer two of the three, whichever these are.
"""

import math

import torch
from torch import Tensor

NEAR = 0.5
"""Up to here the exponents' differences are small: a power series has more digits."""


def slope(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Q^beta (q^alpha - p^alpha) / alpha, the divergence's derivative by log q."""
    both = _times(log_p, alpha) + _times(log_q, beta)
    return _difference(_times(log_q, alpha + beta), both, gap, alpha)


def simple_terms(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Summands whose rounding is that of first-order differences between q and p."""
    if alpha == beta == 0:
        return gap.square() / 2
    both, total = _times(log_p, alpha) + _times(log_q, beta), alpha + beta
    mine, others = _times(log_q, total), _times(log_p, total)
    if alpha >= 0 and beta >= 0:  # two opposite infinities never meet
        return (_difference(mine, both, gap, alpha) - _difference(both, others, gap, beta)) / total
    ends = _difference(mine, others, gap, total)
    if beta < 0:
        return (ends.clamp_min(-1e30) - _difference(both, others, gap, beta)) / alpha
    return (_difference(mine, both, gap, alpha) - ends.clamp_max(1e30)) / beta


def terms(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Summands with all their digits."""
    total = alpha + beta
    largest = max(abs(alpha), abs(beta), abs(total))
    if largest == 0:
        return gap.square() / 2
    close = gap.clamp(-NEAR / largest, NEAR / largest)
    series = torch.zeros_like(gap)
    for c in reversed(_coefficients(beta, total, 15 if gap.dtype == torch.float64 else 8)):
        series = series * close + c
    near = _times(log_p, total).exp() * close.square() * series
    return torch.where(gap == close, near, simple_terms(log_q, log_p, gap, alpha, beta))


def difference(x: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    """E^x - e^y of which x - y is the gap."""
    return torch.maximum(x, y).exp() * gap.abs().neg().expm1() * gap.sign().neg()


def log_of_sum(value: Tensor, log_sum: Tensor, order: float) -> Tensor:
    """Log of the sum of p^order q^(1-order): near 1 by its alpha-divergence, which has more digits."""
    less = order * (1 - order) * value
    near = (less > -0.5) & (less < 0.5)
    return torch.where(near, torch.where(near, -less, 0).log1p(), log_sum)


def _difference(x: Tensor, y: Tensor, gap: Tensor, k: float) -> Tensor:
    """(e^x - e^y) / k where x - y is k times the gap; where k is 0 its limit, 0 without mass whatever the gap."""
    if k == 0:
        return (x.exp() * gap).nan_to_num(0.0, torch.inf, -torch.inf)
    return difference(x, y, k * gap) / k


def _times(x: Tensor, k: float) -> Tensor:
    """K x, and 0 where k is, also times an infinity."""
    return x * k if k else torch.zeros_like(x)


def _coefficients(x: float, y: float, n: int) -> list[float]:
    """Of exp[0, xg, yg] by powers of g: complete homogeneous polynomials of x and y over factorials."""
    sums = [sum(x**i * y ** (k - i) for i in range(k + 1)) for k in range(n)]
    return [h / math.factorial(k + 2) for k, h in enumerate(sums)]
