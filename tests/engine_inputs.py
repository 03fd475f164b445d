"""Inputs of the engine, in every kind of logits, and what the float64 oracle says of them."""

import inspect
from typing import NamedTuple

import losses
import numpy as np
import oracles
import pytest
import torch

from kdloss import LazyLogits, Mixture, TopKLogits

# Every exported divergence by the name of its oracle.
FUNCTIONS = {loss.oracle.__name__: loss.function for loss in losses.DIVERGENCES}
INF, NAN = float("inf"), float("nan")
LABELS = torch.tensor([[3, -100, 0, 10, 5, -100, 7], [2, 2, -100, 1, 9, 4, 4]])
CACHE = {}  # results of `exact`
LEAVES = ("hidden", "weight", "bias")
TAILS = ("bucket", "renormalise", "uniform")
KINDS = ("dense", "lazy", "lazy student", "lazy teacher", "mixture", *(f"top-k {tail}" for tail in TAILS))

every_divergence = pytest.mark.parametrize("name", FUNCTIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Inputs(NamedTuple):
    """Hidden states, weight and bias of student and teacher."""

    student: list
    teacher: list


def inputs(positions=(2, 7), classes=11, width=4, dtype=torch.float64, seed=0):
    """Random inputs; the student's tensors require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(*positions, width), normal(classes, width), normal(classes)]
    teacher = [1.5 * normal(*positions, width), normal(classes, width), normal(classes)]
    return Inputs(student=[x.requires_grad_() for x in student], teacher=teacher)


def sides(kind, x, temperature=1.0):
    """Logits of student and teacher of this kind."""
    student, teacher = LazyLogits(*x.student), LazyLogits(*x.teacher)
    target = teacher.dense()
    if kind == "dense":
        return student.dense(), target
    if kind == "lazy student":
        return student, target
    if kind == "lazy teacher":
        return student.dense(), teacher
    if kind == "mixture":
        return student, Mixture([teacher, target], [0.25, 0.75])
    if kind.startswith("top-k"):
        stored = TopKLogits.of(target, target.shape[-1], tail=kind[6:], temperature=temperature)
        return student.dense(), stored
    return student, teacher


def skip_unsupported(name, kind):
    """Skip divergences that a mixture or top-k teacher does not support: it has no logits, or no fixed classes."""
    function = FUNCTIONS[name]
    if kind == "mixture" and getattr(function, "needs_logits", False):
        pytest.skip("needs the teacher's logits")
    if kind.startswith("top-k") and (name in losses.NO_TOP_K or (name in losses.BY_CLASS and kind != "top-k uniform")):
        pytest.skip("refused")


def numpy(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def exact_kd(name, z, t, temperature, labels):
    oracle = getattr(oracles, name)
    extra = {"labels": labels} if "labels" in inspect.signature(oracle).parameters else {}
    return oracle(z, t, temperature=temperature, **extra)


def exact(name, x, temperature, alpha, labels, keep, upstream=None, divisor=None):
    """Loss and gradients of hidden states, weight and bias in float64 numpy, from the counted positions only."""
    leaves, teacher = numpy(*x.student), numpy(*x.teacher)
    arrays = (*leaves, *teacher, labels, keep, 0 if upstream is None else upstream)
    key = getattr(oracles, name), temperature, alpha, divisor, *(np.asarray(a).tobytes() for a in arrays)
    if key in CACHE:
        return CACHE[key]
    keep = keep.numpy()
    t = (teacher[0] @ teacher[1].T + teacher[2])[keep]
    y = labels.numpy()[keep]
    up = np.ones(len(y)) if upstream is None else upstream.double().numpy()[keep]

    def loss(h, w, b):
        z = h[keep] @ w.T + b
        total = 0
        if alpha > 0:
            total = total + alpha * oracles.cross_entropy(z, y)
        if alpha < 1:
            total = total + (1 - alpha) * exact_kd(name, z, t, temperature, y)
        return (up * total).sum() / (divisor or (len(y) if upstream is None else 1))

    slopes = []
    for i in range(3):
        slopes.append(
            oracles.gradient(lambda v, i=i: loss(*(v if k == i else x for k, x in enumerate(leaves))), leaves[i])
        )
    CACHE[key] = loss(*leaves), slopes
    return CACHE[key]


def agree(loss, x, expected, tolerance, names=LEAVES):
    """Compare the loss and its gradients with the expected ones, each gradient relative to its largest entry."""
    value, slopes = expected
    np.testing.assert_allclose(loss.detach().sum().double(), value, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(loss.sum(), x.student)
    for name, mine, slope in zip(names, ours, slopes, strict=True):
        close(mine, slope, tolerance, name)


def close(ours, slope, tolerance, name="gradient"):
    size = tolerance * abs(slope).max()
    np.testing.assert_allclose(ours.double(), slope, rtol=0, atol=size, err_msg=name)


def relative_error(ours, slope):
    return np.linalg.norm(ours.detach().double().numpy() - slope) / np.linalg.norm(slope)
