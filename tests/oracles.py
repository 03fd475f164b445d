"""Every loss once more, in float64 numpy from its formula, with exact gradients.

Nothing here imports kdloss. A gradient is a complex-step derivative: for an analytic f,
Im f(x + ih) / h is f'(x) to rounding, without the cancellation of finite differences
(Squire and Trapp 1998, "Using complex variables to estimate derivatives of real functions").
"""

import numpy as np


def log_softmax(z, temperature=1.0):
    z = z.real / temperature + 1j * (z.imag / temperature) if np.iscomplexobj(z) else z / temperature
    z = z - z.real.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _kl(log_a, log_b):
    """Sum of a log(a / b), with 0 log 0 = 0."""
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(log_a.real), 0, np.exp(log_a) * (log_a - log_b))
    return terms.sum(-1)


def forward_kl(s, t, temperature=1.0):
    return temperature**2 * _kl(log_softmax(t, temperature), log_softmax(s, temperature))


def reverse_kl(s, t, temperature=1.0):
    return temperature**2 * _kl(log_softmax(s, temperature), log_softmax(t, temperature))


def cross_entropy(z, labels):
    return -np.take_along_axis(log_softmax(z), labels[..., None], -1)[..., 0]


def mse(s, t):
    return ((s - t) ** 2).mean(-1)


def normalized_mse(s, t, eps=1e-6):
    return ((s - t) ** 2).mean(-1) / ((t**2).mean(-1) + eps)


def layer_norm_mse(s, t, eps=1e-5):
    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    return mse(norm(s), norm(t))


def cosine(s, t):
    dot = (s * t).sum(-1)
    return 1 - dot / np.sqrt((s * s).sum(-1)) / np.sqrt((t * t).sum(-1))


def gradient(f, x):
    """Derivative of sum(f(x)) by every entry of x."""
    out, step = np.zeros(x.shape), 1e-30
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1j * step
        out[index] = f(moved).sum().imag / step
    return out
