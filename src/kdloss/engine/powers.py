r"""The alpha-beta family of divergences, without loss of digits where student and teacher are close.

All functions take log q, log p and `gap` = log q - log p, computed without cancellation. With
$\lambda = \alpha + \beta$ the alpha-beta divergence is the sum of
$g^2 \exp[\lambda \log p,\ \alpha \log p + \beta \log q,\ \lambda \log q]$, g the gap and exp[a, b, c] the second
divided difference of exp. It is never negative and covers every limit (alpha, beta or lambda 0) without a special
case. It is the difference of two first divided differences, divided by the difference of the two outermost points,
whichever these are.
"""

import math

import torch
from torch import Tensor

NEAR = 0.5
"""Up to this difference of exponents, a power series has more digits."""


def slope(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Q^beta (q^alpha - p^alpha) / alpha, the divergence's derivative by log q."""
    both = _times(log_p, alpha) + _times(log_q, beta)
    return _difference(_times(log_q, alpha + beta), both, gap, alpha)


def simple_terms(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Summands from first-order differences between q and p, with their rounding."""
    if alpha == beta == 0:
        return gap.square() / 2
    both, total = _times(log_p, alpha) + _times(log_q, beta), alpha + beta
    mine, others = _times(log_q, total), _times(log_p, total)
    if alpha >= 0 and beta >= 0:  # opposite infinities are never added
        return (_difference(mine, both, gap, alpha) - _difference(both, others, gap, beta)) / total
    ends = _difference(mine, others, gap, total)
    if beta < 0:
        return (ends.clamp_min(-1e30) - _difference(both, others, gap, beta)) / alpha
    return (_difference(mine, both, gap, alpha) - ends.clamp_max(1e30)) / beta


def terms(log_q: Tensor, log_p: Tensor, gap: Tensor, alpha: float, beta: float) -> Tensor:
    """Summands with full precision: by a power series where q and p are close."""
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
    """E^x - e^y, where x - y is the gap."""
    return torch.maximum(x, y).exp() * gap.abs().neg().expm1() * gap.sign().neg()


def log_of_sum(value: Tensor, log_sum: Tensor, order: float) -> Tensor:
    """Log of the sum of p^order q^(1-order): where the sum is near 1 from the alpha-divergence, with more digits."""
    less = order * (1 - order) * value
    near = (less > -0.5) & (less < 0.5)
    return torch.where(near, torch.where(near, -less, 0).log1p(), log_sum)


def _difference(x: Tensor, y: Tensor, gap: Tensor, k: float) -> Tensor:
    """(e^x - e^y) / k, where x - y is k times the gap; at k = 0 the limit, which is 0 where there is no mass."""
    if k == 0:
        return (x.exp() * gap).nan_to_num(0.0, torch.inf, -torch.inf)
    return difference(x, y, k * gap) / k


def _times(x: Tensor, k: float) -> Tensor:
    """K x; for k = 0 it is 0, also where x is infinite."""
    return x * k if k else torch.zeros_like(x)


def _coefficients(x: float, y: float, n: int) -> list[float]:
    """Coefficients of exp[0, xg, yg] in powers of g: complete homogeneous polynomials of x and y over factorials."""
    sums = [sum(x**i * y ** (k - i) for i in range(k + 1)) for k in range(n)]
    return [h / math.factorial(k + 2) for k, h in enumerate(sums)]
