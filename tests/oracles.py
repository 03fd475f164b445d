"""Independent implementations of every loss, in float64 numpy from its formula, with exact gradients.

This file does not import kdloss. A gradient is a complex-step derivative: for an analytic f,
Im f(x + ih) / h equals f'(x) up to rounding, without the cancellation of finite differences
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


def symmetric_kl(s, t, temperature=1.0):
    return forward_kl(s, t, temperature) + reverse_kl(s, t, temperature)


def _to_mixture(log_a, log_b, share):
    """KL(a || share · a + (1 - share) · b)."""
    if share == 0:
        return _kl(log_a, log_b)
    log_a, log_b = log_a + np.log(share), log_b + np.log(1 - share)
    top = np.maximum(np.maximum(log_a.real, log_b.real), -1e300)
    log_m = top + np.log(np.exp(log_a - top) + np.exp(log_b - top) + 1e-300)
    return _kl(log_a - np.log(share), log_m)


def jsd(s, t, temperature=1.0, beta=0.5, normalize=False):
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(s, t, temperature)
    log_q, log_p = log_softmax(s, temperature), log_softmax(t, temperature)
    value = beta * _to_mixture(log_p, log_q, beta) + (1 - beta) * _to_mixture(log_q, log_p, 1 - beta)
    return temperature**2 * value / (beta * (1 - beta) if normalize else 1)


def skewed_forward_kl(s, t, temperature=1.0, skew=0.1):
    return temperature**2 * _to_mixture(log_softmax(t, temperature), log_softmax(s, temperature), skew)


def skewed_reverse_kl(s, t, temperature=1.0, skew=0.1):
    return temperature**2 * _to_mixture(log_softmax(s, temperature), log_softmax(t, temperature), skew)


def _abs(x):
    """The absolute value, as a function that is analytic on either side of 0."""
    return x * np.sign(x.real)


def total_variation(s, t, temperature=1.0):
    p, q = np.exp(log_softmax(t, temperature)), np.exp(log_softmax(s, temperature))
    return _abs(p - q).sum(-1) / 2


def _power(log_p, k):
    """P^k, with 0^0 = 1."""
    return np.exp(k * log_p) if k else np.ones(log_p.shape)


def ab_divergence(s, t, temperature=1.0, alpha=0.2, beta=0.7):
    """The definition and its limits, as written by Cichocki, Cruces and Amari."""
    q, p = log_softmax(s, temperature), log_softmax(t, temperature)
    total = alpha + beta
    if alpha == beta == 0:
        terms = (q - p) ** 2 / 2
    elif beta == 0:
        terms = (alpha * _power(p, alpha) * (p - q) - _power(p, alpha) + _power(q, alpha)) / alpha**2
    elif alpha == 0:
        terms = (beta * _power(q, beta) * (q - p) - _power(q, beta) + _power(p, beta)) / beta**2
    elif total == 0:
        terms = (alpha * (q - p) + np.exp(alpha * (p - q)) - 1) / alpha**2
    else:
        product = np.exp(alpha * p + beta * q)
        terms = (alpha / total * _power(p, total) + beta / total * _power(q, total) - product) / (alpha * beta)
    return temperature**2 * terms.sum(-1)


def alpha_divergence(s, t, temperature=1.0, alpha=0.5):
    if alpha in (0, 1):
        return (forward_kl if alpha == 1 else reverse_kl)(s, t, temperature)
    q, p = log_softmax(s, temperature), log_softmax(t, temperature)
    return temperature**2 * (1 - np.exp(alpha * p + (1 - alpha) * q).sum(-1)) / (alpha * (1 - alpha))


def renyi(s, t, temperature=1.0, order=0.5):
    if order == 1:
        return forward_kl(s, t, temperature)
    u = order * log_softmax(t, temperature) + (1 - order) * log_softmax(s, temperature)
    top = u.real.max(-1)
    return temperature**2 * (top + np.log(np.exp(u - top[..., None]).sum(-1))) / (order - 1)


def triangular(s, t, temperature=1.0):
    p, q = np.exp(log_softmax(t, temperature)), np.exp(log_softmax(s, temperature))
    both_zero = (p + q).real < 1e-300  # both probabilities are 0, so the term is 0
    return temperature**2 * np.where(both_zero, 0, (p - q) ** 2 / np.where(both_zero, 1, p + q)).sum(-1)


def with_teacher_temperature(s, t, temperature=1.0):
    return temperature**2 * _kl(log_softmax(t, 3.0), log_softmax(s, temperature))


def _transport(log_a, log_b, cost, epsilon, steps):
    """The cost of the entropic transport from a to b, by Sinkhorn's algorithm."""
    kernel = np.exp(-cost / epsilon).astype(log_a.dtype)  # symmetric

    def log_sum(x):
        top = x.real.max(-1, keepdims=True)
        return np.log(np.exp(x - top) @ kernel) + top

    f, g = np.zeros_like(log_a), np.zeros_like(log_a)
    for _ in range(steps):
        f = -log_sum(log_b + g)
        g = -log_sum(log_a + f)
    return epsilon * ((np.exp(log_a) * f).sum(-1) + (np.exp(log_b) * g).sum(-1))


def sinkhorn(s, t, temperature=1.0, epsilon=0.3, cost=None, steps=60):
    if cost is None:
        places = np.arange(s.shape[-1]) * 0.618 % 1
        cost = np.float32(abs(places - places[:, None])).astype(float)
    q, p = log_softmax(s, temperature), log_softmax(t, temperature)
    q, p = np.broadcast_arrays(q, p)
    same = [_transport(x, x, cost, epsilon, steps) for x in (q, p)]
    return temperature**2 * (_transport(q, p, cost, epsilon, steps) - sum(same) / 2)


def adaptive_kl(s, t, temperature=1.0, head=0.5):
    """Position by position, as in the paper; the weights are constants, without a gradient."""
    p, q = np.exp(log_softmax(t, temperature)), np.exp(log_softmax(s, temperature))
    forward, reverse = forward_kl(s, t, temperature), reverse_kl(s, t, temperature)
    value = np.zeros(p.shape[:-1], dtype=complex if np.iscomplexobj(q) else float)
    for index in np.ndindex(value.shape):
        order, mass, gaps = np.argsort(-p[index], kind="stable"), 0.0, [0.0, 0.0]
        for rank, v in enumerate(order):
            mass += p[index][v]
            gaps[0 if rank == 0 or mass <= head else 1] += abs(p[index][v] - q[index][v].real)
        share = gaps[0] / sum(gaps) if sum(gaps) > 0 else 0.5
        with np.errstate(invalid="ignore"):
            weighted = [w * x for w, x in ((share, forward[index]), (1 - share, reverse[index])) if w > 0]
        value[index] = sum(weighted)
    return value


def logit_mse(s, t, temperature=1.0):
    return ((s - t) ** 2).mean(-1)


def _log_sigmoid(x):
    """-log(1 + exp(-x)), computed from the exponential that is below 1."""
    positive = x.real > 0
    small = np.exp(np.where(positive, -x, x))
    return np.where(positive, 0, x) - np.log(1 + small)


def bernoulli_kl(s, t, temperature=1.0):
    s, t = s / temperature, t / temperature
    both = [np.stack([_log_sigmoid(x), _log_sigmoid(-x)], -1) for x in (t, s)]
    return temperature**2 * _kl(*both).sum(-1)


def _others(z, labels, temperature):
    """Log-probabilities of all classes except the label, normalised without the label."""
    rest = np.arange(z.shape[-1])[None] != labels.reshape(-1)[:, None]
    rows = z.reshape(-1, z.shape[-1])[rest].reshape(*labels.shape, z.shape[-1] - 1)
    return log_softmax(rows, temperature)


def _label_or_not(z, labels, temperature):
    log_p = log_softmax(z, temperature)
    rest = np.zeros(labels.shape, log_p.dtype)
    for index in np.ndindex(labels.shape):  # shifted by the largest of the others, whose exp may underflow
        others = np.delete(log_p[index], labels[index])
        top = max(others.real.max(), -1e300) if others.size else 0.0
        with np.errstate(divide="ignore"):
            rest[index] = top + np.log(np.exp(others - top).sum())
    return np.stack([np.take_along_axis(log_p, labels[..., None], -1)[..., 0], rest], -1)


def dkd(s, t, labels, temperature=1.0, alpha=1.0, beta=8.0):
    target = _kl(_label_or_not(t, labels, temperature), _label_or_not(s, labels, temperature))
    return temperature**2 * (
        alpha * target + beta * _kl(_others(t, labels, temperature), _others(s, labels, temperature))
    )


def nkd(s, t, labels, temperature=1.0, gamma=1.5):
    log_q, log_p = (np.take_along_axis(log_softmax(z), labels[..., None], -1)[..., 0] for z in (s, t))
    others = _kl(_others(t, labels, temperature), _others(s, labels, temperature))
    return -np.exp(log_p) * log_q + gamma * temperature**2 * others


def dist(s, t, temperature=1.0, beta=1.0, gamma=1.0, eps=1e-8):
    def decorrelation(a, b):
        """1 - Pearson's correlation, computed as half the squared distance of the unit vectors."""
        units = []
        for x in (a, b):
            x = x - x.mean(-1, keepdims=True)
            units.append(x / np.sqrt((x * x).sum(-1, keepdims=True) + eps**2))
        return ((units[0] - units[1]) ** 2).sum(-1) / 2

    q, p = np.exp(log_softmax(s, temperature)), np.exp(log_softmax(t, temperature))
    columns = [x.reshape(-1, x.shape[-1]).T for x in (q, p)]
    intra = decorrelation(*columns).mean()
    return temperature**2 * (beta * decorrelation(q, p) + gamma * intra)


def uld(s, t, temperature=1.0):
    rows = []
    for z in (s, t):
        p = np.exp(log_softmax(z, temperature))
        rows.append(np.take_along_axis(p, np.argsort(-p.real, -1), -1))
    return _abs(rows[0] - rows[1]).sum(-1)


def standardized_forward_kl(s, t, temperature=1.0):
    def standard(z):
        gap = z - z.mean(-1, keepdims=True)
        return gap / np.sqrt((gap**2).sum(-1, keepdims=True) / (z.shape[-1] - 1) + 1e-14)

    return forward_kl(standard(s), standard(t), temperature)


def hard_labels(s, t, temperature=1.0):
    return -(temperature**2) * np.take_along_axis(log_softmax(s, temperature), t.argmax(-1)[..., None], -1)[..., 0]


def cross_entropy(z, labels, smoothing=0.0, weight=None):
    """Class by class; labels are class indices, or probabilities of all classes."""
    log_q, classes, total = log_softmax(z), z.shape[-1], 0
    for c in range(classes):
        y = labels[..., c] if labels.dtype.kind == "f" else labels == c
        target = (1 if weight is None else weight[c]) * ((1 - smoothing) * y + smoothing / classes)
        total = total + np.where(target == 0, 0, -target * np.where(target == 0, 0, log_q[..., c]))
    return total


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


def _normalised(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def attention_transfer(s, t, paper=False):
    gap = _normalised((s * s).mean(-1)) - _normalised((t * t).mean(-1))
    return np.sqrt((gap * gap).sum()) * np.ones(len(s)) if paper else gap * gap


def similarity(s, t):
    gap = _normalised(s @ s.T) - _normalised(t @ t.T)
    return (gap * gap).mean(-1)


def _u_centred(k):
    """U-centre a matrix entry by entry, as defined by Székely and Rizzo."""
    n = len(k)
    k = k - np.diag(np.diag(k))
    u = np.zeros_like(k)
    for i, j in np.ndindex(n, n):
        if i != j:
            u[i, j] = k[i, j] - k[i].sum() / (n - 2) - k[:, j].sum() / (n - 2)
            u[i, j] += k.sum() / (n - 1) / (n - 2)
    return u


def cka(s, t, unbiased=False):
    n = len(s)
    h = np.eye(n) - 1 / n
    a, b = (_u_centred(x @ x.T) if unbiased else h @ x @ x.T @ h for x in (s, t))
    gap = a / np.sqrt((a * a).sum()) - b / np.sqrt((b * b).sum())
    return n * (gap * gap).sum(-1) / 2


def _visible(scores, causal):
    """List, for every query, its scores of the keys that it may attend to."""
    return [row[: i + 1] if causal else row for i, row in enumerate(scores)]


def _head_scores(x, parts, heads):
    """Return a function of two parts' indices that gives their scaled products, one matrix per head."""
    d = x.shape[-1] // parts // heads
    cut = [[x[:, (p * heads + a) * d :][:, :d] for a in range(heads)] for p in range(parts)]
    return lambda p, q: [cut[p][a] @ cut[q][a].T / np.sqrt(d) for a in range(heads)]


def _relation_kl(s, t, causal):
    """KL(teacher || student), averaged over heads."""
    values = [
        [_kl(log_softmax(b), log_softmax(a)) for a, b in zip(_visible(x, causal), _visible(y, causal), strict=True)]
        for x, y in zip(s, t, strict=True)
    ]
    return np.array(values).mean(0)


def attention_mse(s, t, heads, causal=False):
    pairs = zip(_head_scores(s, 2, heads)(0, 1), _head_scores(t, 2, heads)(0, 1), strict=True)
    return np.array([[(row * row).mean() for row in _visible(x - y, causal)] for x, y in pairs]).mean(0)


def minilm(s, t, heads, causal=False):
    a, b = _head_scores(s, 3, heads), _head_scores(t, 3, heads)
    return sum(_relation_kl(a(*which), b(*which), causal) for which in ((0, 1), (2, 2)))


def minilm_v2(s, t, relation_heads, parts=3, causal=False):
    a, b = _head_scores(s, parts, relation_heads), _head_scores(t, parts, relation_heads)
    return sum(_relation_kl(a(p, p), b(p, p), causal) for p in range(parts))


def _softplus(x):
    return -_log_sigmoid(-x)


def vid(s, t, p, eps=1e-5):
    variance = _softplus(p["alpha"]) + eps
    return ((s - t) ** 2 / variance + np.log(variance)).mean(-1) / 2


def _convolution(grid, weight, bias):
    """A 3 x 3 convolution with zero padding, position by position; `grid` is [H, W, C]."""
    height, width, _ = grid.shape
    out = np.zeros((height, width, len(weight)), dtype=np.result_type(grid, weight)) + bias
    for y, x, dy, dx in np.ndindex(height, width, 3, 3):
        if 0 <= y + dy - 1 < height and 0 <= x + dx - 1 < width:
            out[y, x] += weight[:, :, dy, dx] @ grid[y + dy - 1, x + dx - 1]
    return out


def mgd(s, t, p, size):
    hidden = _convolution(s.reshape(*size, s.shape[-1]), p["first.weight"], p["first.bias"])
    made = _convolution(hidden * (hidden.real > 0), p["second.weight"], p["second.bias"])
    return ((made.reshape(len(s), -1) - t) ** 2).mean(-1)


def crd(s, t, p, temperature, **_):
    s, t = (_normalised(x @ p[f"{side}.weight"].T + p[f"{side}.bias"]) for x, side in ((s, "student"), (t, "teacher")))
    n, width = p["students"].shape
    noise = n * np.exp(1 / (2 * width * temperature**2))

    def h(products):
        return 1 / (1 + noise * np.exp(-products / temperature))

    positive = h((s * t).sum(-1))
    negatives = np.log(1 - h(s @ p["teachers"].T)).sum(-1) + np.log(1 - h(t @ p["students"].T)).sum(-1)
    return -2 * np.log(positive) - negatives


def _smooth(x, beta=1.0):
    return np.where(abs(x.real) < beta, x * x / 2 / beta, _abs(x) - beta / 2)


def smooth_l1(s, t, beta=1.0):
    return _smooth(s - t, beta).mean(-1)


def standardized_mse(s, t, eps=1e-5):
    return ((s - t) ** 2 / (t.reshape(-1, t.shape[-1]).var(0) + eps)).mean(-1)


def pkd(s, t):
    return ((_normalised(s) - _normalised(t)) ** 2).sum(-1)


def activation_boundary(s, t, margin=1.0):
    off = (s + margin) ** 2 * ((s.real > -margin) & (t <= 0))
    on = (s - margin) ** 2 * ((s.real <= margin) & (t > 0))
    return (off + on).mean(-1)


def rkd_distance(s, t):
    n, relative = len(s), []
    for x in (s, t):
        d = np.zeros((n, n), dtype=x.dtype)
        for i, j in np.ndindex(n, n):
            if i != j:
                d[i, j] = np.sqrt(((x[i] - x[j]) ** 2).sum())
        relative.append(d / (d.sum() / (n * (n - 1))))
    return _smooth(relative[0] - relative[1]).mean(-1)


def _angle(x, i, j, k):
    """The cosine of the angle at vertex i, for one triple."""
    if i in (j, k):
        return 0.0
    return (_normalised(x[j] - x[i]) * _normalised(x[k] - x[i])).sum()


def rkd_angle(s, t):
    n = len(s)
    cubes = [np.array([_angle(x, *index) for index in np.ndindex(n, n, n)]).reshape(n, n, n) for x in (s, t)]
    return _smooth(cubes[0] - cubes[1]).mean((-2, -1))


def pkt(s, t, eps=1e-7):
    shares = []
    for x in (s, t):
        closeness = (_normalised(x) @ _normalised(x).T + 1) / 2 + eps
        shares.append(np.log(closeness / closeness.sum(-1, keepdims=True)))
    return _kl(shares[1], shares[0]) / len(s)


def correlation_congruence(s, t, gamma=0.4, order=2):
    kernels = []
    for x in (s, t):
        cosine, kernel, factorial = _normalised(x) @ _normalised(x).T, 0, 1
        for p in range(order + 1):
            factorial *= max(p, 1)
            kernel = kernel + np.exp(-2 * gamma) * (2 * gamma) ** p / factorial * cosine**p
        kernels.append(kernel)
    return ((kernels[0] - kernels[1]) ** 2).mean(-1)


def nst(s, t):
    """Compare the mean outer products of the channels, which are added one by one."""
    both = []
    for x in (s, t):
        channels = [_normalised(x[:, c]) for c in range(x.shape[1])]
        both.append(sum(np.outer(c, c) for c in channels) / len(channels))
    return len(s) * ((both[0] - both[1]) ** 2).sum(-1)


def fsp(s, t, split=None):
    flows = []
    for x in (s, t):
        early = x.shape[1] // 2 if split is None else split
        flows.append(np.einsum("ni,nj->ij", x[:, :early], x[:, early:]) / len(x))
    return ((flows[0] - flows[1]) ** 2).sum() * np.ones(len(s))


def cwd(s, t, temperature=4.0):
    return forward_kl(s.T, t.T, temperature).mean() * np.ones(len(s))


def word_relation(s, t, window=21, triple_weight=1.0):
    n, values = len(s), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        cosines = [np.array([(_normalised(x[i]) * _normalised(x[j])).sum() for j in others]) for x in (s, t)]
        pair = forward_kl(*cosines) / n
        near = [j for j in range(n) if abs(i - j) <= window // 2]
        gaps = [(_angle(s, i, j, k) - _angle(t, i, j, k)) ** 2 for j in near for k in near]
        values.append(pair + triple_weight * sum(gaps) / len(near) ** 2)
    return np.array(values)


def gradient(f, x, positions_apart=False):
    """Return the derivative of sum(f(x)) with respect to every entry of x.

    With `positions_apart`, where each value depends on its own position only, one class is perturbed at all positions
    at once.
    """
    out, step = np.zeros(x.shape), 1e-30
    for index in np.ndindex(x.shape[-1:] if positions_apart else x.shape):
        at, moved = (..., *index), x.astype(complex)
        moved[at] += 1j * step
        value = f(moved)
        out[at] = (value if positions_apart else value.sum()).imag / step
    return out
