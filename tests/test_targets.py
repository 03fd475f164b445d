"""Each kind of logits against the dense logits that it represents, in numpy; and what each kind refuses."""

import copy
import dataclasses
import math
import pickle

import losses
import mpmath
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from versions import since_torch, since_transformers_5

import kdloss
from kdloss import LazyLogits, Mixture, TokenMap, TopKLogits, VanillaKD

INF = float("inf")
TAILS = ("bucket", "renormalise", "uniform")
TEXTS = [s for m in (kdloss, math, np.linalg, torch.nn.Linear, F) for s in (m.__doc__ or "").splitlines()]


def random_logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def loss_and_slope(student, teacher, temperature=1.0, divergence=kdloss.divergences.forward_kl, **settings):
    """The criterion's value at each position, and the gradient of their sum."""
    student = student.clone().requires_grad_()
    criterion = VanillaKD(temperature, 0.0, divergence=divergence, reduction="none", **settings)
    values = criterion(student, teacher)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def agrees(ours, oracle, student, tolerance=1e-10):
    """Values and gradient equal those of `oracle`, a function of the student's logits in numpy."""
    values, slope = ours
    z = student.double().numpy()
    np.testing.assert_allclose(values, oracle(z), rtol=tolerance, atol=tolerance)
    exact = oracles.gradient(oracle, z)
    np.testing.assert_allclose(slope.double(), exact, rtol=0, atol=tolerance * abs(exact).max())


# -- lazy logits --


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_lazy_logits_are_scaled_then_capped_and_gradients_go_back_through_both(softcap, scale, with_bias, monkeypatch):
    monkeypatch.setattr("kdloss.engine.block_sizes.block_rows", lambda *_: 2)
    leaves = [random_logits(5, 4), random_logits(9, 4, seed=1), random_logits(9, seed=2)][: 3 if with_bias else 2]
    teacher, labels = random_logits(5, 9, seed=3), torch.tensor([1, 0, 8, 3, 3])

    def oracle(*x):
        z = scale * (x[0] @ x[1].T + (x[2] if with_bias else 0))
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        return (0.3 * oracles.cross_entropy(z, labels.numpy()) + 0.7 * oracles.forward_kl(z, t, 2.0)).mean()

    x, t = [leaf.numpy() for leaf in leaves], teacher.numpy()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    student = LazyLogits(*leaves, softcap=softcap, scale=scale)
    loss = VanillaKD(2.0, 0.3)(student, teacher, labels)
    assert loss.item() == pytest.approx(oracle(*x), rel=1e-12)
    np.testing.assert_allclose(VanillaKD(2.0, 0.3)(student.dense(), teacher, labels).item(), oracle(*x), rtol=1e-12)
    for i, ours in enumerate(torch.autograd.grad(loss, leaves)):
        exact = oracles.gradient(lambda v, i=i: oracle(*(v if k == i else y for k, y in enumerate(x))), x[i])
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-10 * abs(exact).max())
    as_teacher = VanillaKD(2.0, 0.0)(teacher, student)
    assert as_teacher.item() == pytest.approx(VanillaKD(2.0, 0.0)(teacher, student.dense()).item(), rel=1e-12)


def test_lazy_logits_that_do_not_fit_are_refused():
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(7, 4)
    cases = [
        (ValueError, r"hidden \(2, 3, 4\) and weight \(4, 7\) don't fit", (hidden, weight.T)),
        (ValueError, "don't fit", (torch.tensor(1.0), weight)),
        (ValueError, "don't fit", (hidden, weight[0])),
        (
            ValueError,
            r"bias has shape \(6,\), weight \(7, 4\) needs \(7,\)",
            (hidden, weight, torch.zeros(6)),
        ),
        (TypeError, r"hidden must be floating point.*hidden\.float\(\)", (hidden.long(), weight)),
        (TypeError, "weight must be floating point", (hidden, weight.long())),
        (TypeError, "bias must be floating point", (hidden, weight, torch.zeros(7).long())),
        (TypeError, "hidden must be a tensor, got list", ([1.0], weight)),
        (ValueError, r"weight\.to\('cpu'\)", (hidden, weight.to("meta"))),
        (ValueError, r"bias\.to\('cpu'\)", (hidden, weight, torch.zeros(7, device="meta"))),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            LazyLogits(*arguments)
    for wrong in (0.0, -30.0, INF):
        with pytest.raises(ValueError, match=r"softcap must be"):
            LazyLogits(hidden, weight, softcap=wrong)
    assert LazyLogits(hidden, weight).shape == (2, 3, 7)
    with pytest.raises(ValueError, match="one entry per class"):
        kdloss.divergences.forward_kl(LazyLogits(hidden, weight[:0]), torch.zeros(2, 3, 0))


# -- top-k --


def bucket(t, k, temperature):
    """Return a function, in numpy: log-probabilities of the teacher's top k classes, and of all others as one class."""
    kept = np.argsort(-t, -1)[..., :k]

    def grouped(z):
        log_p = oracles.log_softmax(z, temperature)
        left = np.ones(log_p.shape, bool)
        np.put_along_axis(left, kept, False, -1)
        mine = np.take_along_axis(log_p, kept, -1)
        rest = np.log(np.where(left, np.exp(log_p), 0).sum(-1, keepdims=True)) if k < t.shape[-1] else None
        return mine if rest is None else np.concatenate([mine, rest], -1)

    return grouped


@pytest.mark.parametrize("k", [1, 3, 10, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("with_rest", [True, False], ids=["with log_rest", "without log_rest"])
def test_the_bucket_is_one_class_of_all_classes_left_out(k, temperature, name, with_rest):
    student, teacher = random_logits(4, 11), random_logits(4, 11, seed=1)
    kept = TopKLogits.of(teacher, k, temperature=temperature)
    if not with_rest:
        kept = TopKLogits(kept.indices, kept.log_probs, temperature=temperature)
    grouped = bucket(teacher.numpy(), k, temperature)

    def oracle(z):
        log_q, log_p = grouped(z), grouped(teacher.numpy())
        a, b = (log_p, log_q) if name == "forward_kl" else (log_q, log_p)
        return temperature**2 * (np.exp(a) * (a - b)).sum(-1)

    ours = loss_and_slope(student, kept, temperature, getattr(kdloss.divergences, name))
    agrees(ours, oracle, student, 1e-9)


@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_renormalise_compares_only_the_kept_classes(k, name):
    student, teacher = random_logits(4, 11), random_logits(4, 11, seed=1)
    order = np.argsort(-teacher.numpy(), -1)[..., :k]

    def oracle(z):
        return getattr(oracles, name)(
            np.take_along_axis(z, order, -1), np.take_along_axis(teacher.numpy(), order, -1), 2.0
        )

    kept = TopKLogits.of(teacher, k, tail="renormalise", temperature=2.0)
    values, slope = ours = loss_and_slope(student, kept, 2.0, getattr(kdloss.divergences, name))
    if k > 1:
        agrees(ours, oracle, student)
    else:
        assert not values.any()
    left = torch.ones(4, 11, dtype=torch.bool).scatter(-1, torch.from_numpy(order.copy()), False)
    assert not slope[left].any()


def spread(log_probs, indices, vocabulary):
    """Dense log-probabilities in numpy: the remaining mass is spread evenly over the classes without an index."""
    p = np.full((len(indices), vocabulary), np.nan)
    for row, ids, values in zip(p, indices, np.exp(log_probs), strict=True):
        there = ids >= 0
        rest = 1 - values[there].sum()
        row[:] = rest / max(vocabulary - there.sum(), 1)
        row[ids[there]] = values[there]
    return np.log(p)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_uniform_tail_equals_a_dense_teacher_with_that_tail(name, empty):
    student, teacher = random_logits(4, 11), random_logits(4, 11, seed=1)
    kept = TopKLogits.of(teacher, 4, temperature=2.0)
    indices = kept.indices.clone()
    if empty:
        indices[0, 2:], indices[1, 0], indices[3, 3] = -1, -1, -1
    log_p = spread(kept.log_probs.numpy(), indices.numpy(), 11)
    dense = 2.0 * log_p  # logits that have these log-probabilities at T = 2
    uniform = TopKLogits(indices, kept.log_probs, "uniform", 2.0)
    ours = loss_and_slope(student, uniform, 2.0, getattr(kdloss.divergences, name))
    agrees(ours, lambda z: getattr(oracles, name)(z, dense, 2.0), student, 1e-9)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_empty_slots_change_nothing(tail):
    student, teacher = random_logits(4, 11), random_logits(4, 11, seed=1)
    kept = TopKLogits.of(teacher, 3, tail=tail)
    pad = torch.full((4, 2), -1)
    indices = torch.cat([pad[:, :1], kept.indices, pad[:, :1]], -1)
    log_probs = torch.cat([torch.full((4, 1), -0.5), kept.log_probs, torch.full((4, 1), 3.0)], -1)
    padded = TopKLogits(indices, log_probs, tail)
    unpadded = TopKLogits(kept.indices, kept.log_probs, tail)
    for ours, expected in zip(loss_and_slope(student, padded), loss_and_slope(student, unpadded), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


NUMBERS = st.floats(-20, 20, width=32)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(NUMBERS, min_size=12, max_size=12),
    k=st.integers(1, 6),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_losses_with_a_bucket_are_never_negative_and_forward_kl_is_at_most_the_dense_one(values, k, temperature):
    student, teacher = torch.tensor(values).view(2, 1, 6)
    kept = TopKLogits.of(teacher, k, temperature=temperature)
    dense = oracles.forward_kl(student.double().numpy(), teacher.double().numpy(), temperature)
    value, slope = loss_and_slope(student, kept, temperature)
    assert slope.isfinite().all()
    rounding = 1e-5 * (temperature**2 + abs(dense).max())
    assert -rounding <= value.item() <= dense.item() + rounding
    reverse, _ = loss_and_slope(student, kept, temperature, kdloss.divergences.reverse_kl)
    assert reverse.item() >= -rounding


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_and_gradient_are_zero_where_the_student_equals_a_top_k_teacher(tail, dtype):
    teacher = random_logits(5, 50).float()
    for k in (50, 8) if tail != "uniform" else (50,):
        for temperature in (1.0, 2.0):
            kept = TopKLogits.of(teacher, k, tail=tail, temperature=temperature)
            rounded = TopKLogits(kept.indices, kept.log_probs.to(dtype), tail, temperature, kept.log_rest)
            value, slope = loss_and_slope(teacher, rounded, temperature)
            bound = 1e-6 if dtype == torch.float32 else 2e-3
            assert value.abs().max() <= bound
            assert slope.abs().max() <= (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int16,
        torch.int32,
        *(pytest.param(d, marks=since_torch(2, 6)) for d in (torch.uint16, torch.uint32)),
    ],
)
@pytest.mark.parametrize("tail", TAILS)
def test_indices_may_be_of_any_integer_type_and_log_probs_of_any_precision(dtype, tail):
    student, teacher = random_logits(4, 3, 11), random_logits(4, 3, 11, seed=1)
    labels = torch.tensor([[1, -100, 2]] * 4)
    kept = TopKLogits.of(teacher, 4, tail=tail)
    expected = VanillaKD()(student, kept, labels)
    narrow = TopKLogits(kept.indices.to(dtype), kept.log_probs, tail, log_rest=kept.log_rest)
    for causal in (False, True):
        criterion = VanillaKD(causal=causal, check_finite=True)
        assert criterion(student, narrow, labels).item() == criterion(student, kept, labels).item()
    assert VanillaKD()(student, narrow, labels).item() == expected.item()
    half = TopKLogits(narrow.indices, kept.log_probs.half(), tail, log_rest=kept.log_rest.half())
    ours = VanillaKD()(student.float(), half, labels)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), abs=2e-2)
    assert kdloss.divergences.forward_kl(student, narrow).shape == (4, 3)


def test_log_probs_stored_at_one_temperature_are_softened_to_another_with_the_bucket_as_one_class():
    student, teacher = random_logits(4, 11), random_logits(4, 11, seed=1)
    k, stored, asked = 3, 2.0, 3.0
    grouped = bucket(teacher.numpy(), k, stored)

    def oracle(z):
        return oracles.forward_kl(stored * grouped(z), stored * grouped(teacher.numpy()), asked)

    agrees(loss_and_slope(student, TopKLogits.of(teacher, k, temperature=stored), asked), oracle, student, 1e-9)
    everything = TopKLogits.of(teacher, 11, temperature=stored)
    agrees(
        loss_and_slope(student, everything, asked),
        lambda z: oracles.forward_kl(z, teacher.numpy(), asked),
        student,
        1e-9,
    )


def test_a_bucket_is_exact_with_262144_classes_and_where_the_student_has_no_mass_on_the_rest():
    student = torch.zeros(1, 262_144)
    kept = TopKLogits(torch.tensor([[262_143, 7]], dtype=torch.int32), torch.tensor([[0.5, 0.25]]).log())
    rest = math.log(0.25 / (262_142 / 262_144))
    value = 0.5 * math.log(0.5 * 262_144) + 0.25 * math.log(0.25 * 262_144) + 0.25 * rest
    assert loss_and_slope(student, kept)[0].item() == pytest.approx(value, rel=1e-6)
    only = torch.tensor([[0.0, 0.0, -INF, -INF]])
    value, slope = loss_and_slope(only, TopKLogits.of(only, 2))
    assert value.item() == 0
    assert not slope.any()
    value, _ = loss_and_slope(only, TopKLogits.of(torch.zeros(1, 4), 2))
    assert value.item() == INF  # the teacher has a quarter on each class that the student excludes


SURE_STUDENTS = [
    [[50.0, 0.0, 0.5, -0.3]],  # the other probabilities are below float32's precision relative to the first,
    [[110.0, 0.0, 0.5, -0.3]],  # below float32's smallest number,
    [[1e4, 0.0, 0.5, -0.3]],  # below float64's smallest number,
    [[1e4, 9999.0, -1e4, -9990.0]],  # and far from each other
    [[1e4, 1e4 - 2, 9997.0, 9999.5]],  # all logits are large
    [[0.25, -1e4, -1e4 - 2, -INF]],
    [[0.0, 0.5, 50.0, -0.3]],  # the student is sure of a class that is not kept
    [[0.0, 0.5, -0.3, 1e4]],
]


def few_by_mpmath(student, teacher, k, temperature, name, tail):
    """A divergence over k classes, and the others as one under "bucket", and its gradient, with sixty digits."""
    with mpmath.workdps(60):
        kept = np.argsort(-np.array(teacher))[:k]
        left = [v for v in range(len(teacher)) if v not in kept]

        def grouped(z):
            e = [mpmath.exp(mpmath.mpf(x) / temperature) if x > -INF else mpmath.mpf(0) for x in z]
            few = [e[v] for v in kept] + ([mpmath.fsum(e[v] for v in left)] if tail == "bucket" else [])
            return [x / mpmath.fsum(few) for x in few], e

        (p, _), (q, e) = grouped(teacher), grouped(student)
        a, b = (p, q) if name == "forward_kl" else (q, p)
        value = mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x)
        mine = [mpmath.log(x / y) if x else 0 for x, y in zip(q, p, strict=True)]
        by_log = [x * (r - value) if name == "reverse_kl" else x - y for x, y, r in zip(q, p, mine, strict=True)]
        slope = np.zeros(len(teacher))
        for place, v in enumerate(kept):
            slope[v] = temperature * by_log[place]
        for v in left if tail == "bucket" else []:
            slope[v] = temperature * by_log[k] * e[v] / mpmath.fsum(e[u] for u in left)
        return float(temperature**2 * value), slope


@pytest.mark.parametrize("sure", SURE_STUDENTS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_keep_their_digits_where_the_student_is_sure_of_one_class(sure, tail, name, dtype):
    teacher = [2.0, 1.0, 0.0, -1.0]
    student = torch.tensor(sure).to(dtype)
    divergence = getattr(kdloss.divergences, name)
    for k, temperature in ((1, 1.0), (2, 0.3), (2, 4.0)):
        kept = TopKLogits.of(torch.tensor([teacher], dtype=torch.float64), k, tail=tail, temperature=temperature)
        if dtype != torch.float64:
            kept = dataclasses.replace(kept, log_probs=kept.log_probs.float(), log_rest=kept.log_rest.float())
        exact, slope = few_by_mpmath(student[0].double().tolist(), teacher, k, temperature, name, tail)
        z = student.clone().requires_grad_()
        plain = divergence(*kept.against(z), temperature=temperature)
        by_autograd = plain.detach(), torch.autograd.grad(plain.sum(), z)[0]
        with_labels = VanillaKD(temperature, 0.5, divergence=divergence)(z, kept, torch.tensor([0]))
        beside = 2 * torch.autograd.grad(with_labels, z)[0] - (z.detach().softmax(-1) - torch.eye(4)[0]).to(dtype)
        value, ours = loss_and_slope(student, kept, temperature, divergence)
        digits = 1e-9 if dtype == torch.float64 else 1e-5
        for got in (value, by_autograd[0]):
            assert got.item() == pytest.approx(exact, rel=digits, abs=digits)
        coarse = 1e-2 if dtype == torch.bfloat16 else digits
        for got in (ours, by_autograd[1], beside):
            np.testing.assert_allclose(got[0].double(), slope, rtol=0, atol=max(1, abs(slope).max()) * coarse)


OF_FEW_CLASSES = sorted(
    {*kdloss.divergences.__all__} - losses.NO_TOP_K - losses.BY_CLASS - {"standardized", "with_teacher_temperature"}
)


@pytest.mark.parametrize("name", OF_FEW_CLASSES)
@pytest.mark.parametrize("tail", TAILS)
def test_divergences_of_few_classes_agree_with_float64_where_the_student_is_sure_of_one_class(name, tail):
    divergence = getattr(kdloss.divergences, name)
    for gap in (50.0, 110.0, 1e4):
        z = torch.tensor([[gap, 0.0, 0.5, -0.3]])
        kept = TopKLogits.of(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 2, tail=tail, temperature=0.5)
        results = []
        for student in (z.clone().requires_grad_(), z.double().requires_grad_()):
            value = divergence(student, kept, temperature=0.5).sum()
            results.append((value.item(), torch.autograd.grad(value, student)[0].double()))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_float64_top_k_teacher_is_compared_in_float64(tail):
    student = random_logits(4, 11).float()
    kept = TopKLogits.of(random_logits(4, 11, seed=1), 3, tail=tail, temperature=2.0)
    for name in ("forward_kl", "jsd", "adaptive_kl", "total_variation"):
        divergence = getattr(kdloss.divergences, name)
        (ours, slope), (exact, expected) = (
            loss_and_slope(z, kept, 2.0, divergence) for z in (student, student.double())
        )
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, expected.float(), rtol=1e-6, atol=1e-8)
        few, wide = (divergence(*kept.against(z), temperature=2.0) for z in (student, student.double()))
        torch.testing.assert_close(few, wide, rtol=1e-12, atol=1e-12)


def test_a_nan_logit_of_a_class_that_is_not_compared_leaves_the_loss_finite_and_gets_no_gradient():
    kept = TopKLogits.of(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 2, tail="renormalise")
    value, slope = loss_and_slope(torch.tensor([[1.0, 0.0, float("nan"), 3.0]]), kept)
    assert value.isfinite().all()
    assert slope[0, 2:].tolist() == [0, 0]


def test_top_k_logits_that_do_not_fit_are_refused():
    ids, log_probs = torch.tensor([[0, 2, 1], [5, 10, 3]]), torch.full((2, 3), -2.0)
    cases = [
        (TypeError, r"indices must be integers.*indices\.long\(\)", {"indices": ids.float()}),
        (TypeError, "indices must be integers", {"indices": ids.bool()}),
        (TypeError, "log_probs must be floating point", {"log_probs": ids}),
        (ValueError, r"indices \(2, 3\) and log_probs \(2, 2\)", {"log_probs": log_probs[:, :2]}),
        (ValueError, "k of 1 or more", {"indices": ids[:, :0], "log_probs": log_probs[:, :0]}),
        (ValueError, "k of 1 or more", {"indices": ids[0, 0], "log_probs": log_probs[0, 0]}),
        (ValueError, r"log_rest has shape \(3,\)", {"log_rest": torch.zeros(3)}),
        (ValueError, "choose one of", {"tail": "buckets"}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (TypeError, "temperature", {"temperature": "1"}),
        (ValueError, "meta", {"log_probs": log_probs.to("meta")}),
    ]
    for error, match, change in cases:
        with pytest.raises(error, match=match):
            TopKLogits(**({"indices": ids, "log_probs": log_probs} | change))
    for k in (0, 12):
        with pytest.raises(ValueError, match=rf"k={k} of 11 classes"):
            TopKLogits.of(torch.zeros(2, 11), k)
    stated = TopKLogits(ids, log_probs, vocabulary=64)
    with pytest.raises(ValueError, match=r"student has 11 classes and the teacher 64"):
        VanillaKD(alpha=0.0)(torch.zeros(2, 11), stated)
    assert VanillaKD(alpha=0.0)(torch.zeros(2, 64), stated).isfinite()
    with pytest.raises(ValueError, match="nothing is broadcast"):
        VanillaKD(alpha=0.0)(torch.zeros(3, 11), TopKLogits(ids, log_probs))


def valid_top_k(seed=0):
    """Valid indices and log-probabilities: two positions of three classes each."""
    kept = TopKLogits.of(random_logits(2, 11, seed=seed), 3)
    return kept.indices, kept.log_probs


WRONG = {
    "a class twice": (lambda i, p: (torch.tensor([4, 0, 4]).expand(2, 3), p), "class 4 twice"),
    "a class twice, once without mass": (
        lambda i, p: (torch.tensor([4, 0, 4]).expand(2, 3), p.index_fill(1, torch.tensor([2]), -torch.inf)),
        "from_served",
    ),
    "an id below -1": (lambda i, p: (i.index_fill(1, torch.tensor([2]), -100), p), "is -100, outside the"),
    "raw logits": (lambda i, p: (i, p + 5), r"log_softmax\(-1\) over all classes.*TopKLogits\.of\(logits, k\)"),
    "one log-probability above 0": (lambda i, p: (i, torch.tensor([[-9.0, -9.0, 0.5]]).expand(2, 3)), "more than 1"),
    "probabilities": (lambda i, p: (i, p.exp()), r"probabilities; write log_probs=probabilities\.log\(\)"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "match"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("tail", TAILS)
def test_impossible_top_k_logits_are_refused_at_construction(wrong, match, tail):
    with pytest.raises(ValueError, match=match):
        TopKLogits(*wrong(*valid_top_k()), tail)


@pytest.mark.parametrize(("wrong", "match"), WRONG.values(), ids=WRONG)
def test_impossible_top_k_logits_on_an_accelerator_are_refused_under_check_finite(wrong, match, monkeypatch):
    monkeypatch.setattr(kdloss.targets.looks, "free_to_look", lambda *x: False)  # as on an accelerator
    kept, student = TopKLogits(*wrong(*valid_top_k())), random_logits(2, 11, seed=2)
    with pytest.raises(ValueError, match=match):
        VanillaKD(alpha=0.0, check_finite=True)(student, kept)
    with pytest.raises(ValueError, match=match):  # dist is computed separately, outside the sweep
        VanillaKD(alpha=0.0, check_finite=True, divergence=kdloss.divergences.dist)(
            student, dataclasses.replace(kept, tail="uniform")
        )


def test_an_id_out_of_range_is_refused_unless_its_position_is_masked():
    indices, log_probs = valid_top_k()
    indices[1, 2] = 11
    with pytest.raises(ValueError, match=r"indices\[1, 2\] is 11, outside the 11 classes, 0 to 10"):
        TopKLogits(indices, log_probs, vocabulary=11)
    kept, student = TopKLogits(indices, log_probs), random_logits(2, 11, seed=2)
    for loss in (VanillaKD(alpha=0.0), kdloss.divergences.forward_kl):
        with pytest.raises(ValueError, match="is 11, outside"):
            loss(student, kept)
    first = VanillaKD(alpha=0.0)(student[:1], TopKLogits(indices[:1], log_probs[:1]))
    torch.testing.assert_close(VanillaKD(alpha=0.0)(student, kept, mask=torch.tensor([True, False])), first)


@pytest.mark.parametrize("fill", [0.0, -torch.inf, torch.nan])
def test_padding_is_refused_only_where_it_counts(fill):
    indices, log_probs = valid_top_k()
    indices[1], log_probs[1] = 0, fill
    kept, student = TopKLogits(indices, log_probs), random_logits(2, 11, seed=2)
    mask = torch.tensor([True, False])
    for check in (False, True):
        loss = VanillaKD(alpha=0.0, check_finite=check)
        torch.testing.assert_close(
            loss(student, kept, mask=mask), loss(student[:1], TopKLogits(indices[:1], log_probs[:1]))
        )
        with pytest.raises(ValueError, match="class 0 twice"):
            loss(student, kept)
    with pytest.raises(ValueError, match="class 0 twice"):
        kdloss.divergences.forward_kl(student, kept)
    causal = VanillaKD(alpha=0.0, causal=True)
    assert causal(student[None], kept.at(lambda t: t[None])).isfinite()  # the last position predicts no label
    first = TopKLogits(indices[:1], log_probs[:1])
    for divergence in (kdloss.divergences.forward_kl, kdloss.divergences.adaptive_kl):
        z, alone = student.clone().requires_grad_(), student[:1].clone().requires_grad_()
        value, expected = kdloss.masked(divergence, z, kept, mask), divergence(alone, first).sum()
        torch.testing.assert_close(value, expected)
        slope = torch.autograd.grad(value, z)[0]
        torch.testing.assert_close(slope[:1], torch.autograd.grad(expected, alone)[0])
        assert not slope[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_probs_rounded_to_16_bits_are_accepted(dtype):
    for size in (0.01, 1.0, 10.0):
        kept = TopKLogits.of(random_logits(64, 300) * size, 290)
        for again in (kept.log_probs.to(dtype), kept.log_probs.to(dtype).float()):
            TopKLogits(kept.indices, again, log_rest=kept.log_rest.to(dtype))


EVERY_TAIL = [(name, tail) for name in ("forward_kl", "reverse_kl", "jsd", "total_variation") for tail in TAILS]


@pytest.mark.parametrize(("name", "tail"), [*EVERY_TAIL, ("hard_labels", "uniform")])
@pytest.mark.parametrize("path", ["engine", "autograd", "compiled"])
def test_a_position_without_classes_has_no_loss_and_no_gradient(tail, path, name):
    indices, log_probs = valid_top_k()
    valid = TopKLogits(indices, log_probs, tail)
    indices, log_probs = indices.clone(), log_probs.clone()
    indices[1], log_probs[1] = -1, torch.nan if path == "engine" else -torch.inf
    kept, student = TopKLogits(indices, log_probs, tail), random_logits(2, 11, seed=2).requires_grad_()
    divergence = getattr(kdloss.divergences, name)
    other = divergence(student[:1], valid.at(lambda t: t[:1]))
    if path == "engine":
        values = divergence(student, kept)
    elif path == "autograd":
        values = kdloss.engine.TeacherTask(divergence, kept).values(student)
    else:
        criterion = VanillaKD(1.0, 0.0, divergence=divergence, reduction="none")

        def step(z, i, p):
            return criterion(z, TopKLogits(i, p, tail))

        torch.compiler.reset()
        values = torch.compile(step, backend="eager", fullgraph=True)(student, indices, log_probs)
    torch.testing.assert_close(values, torch.cat([other, torch.zeros_like(other)]))
    (slope,) = torch.autograd.grad(values.sum(), student)
    assert slope[0].abs().sum() > 0
    assert torch.equal(slope[1], torch.zeros_like(slope[1]))


def test_top_k_logits_work_as_meta_tensors_and_survive_copy_and_pickle():
    indices, log_probs = (x.to("meta") for x in valid_top_k())
    loss = VanillaKD(1.0, 0.0)(torch.zeros(2, 11, device="meta"), TopKLogits(indices, log_probs))
    assert loss.is_meta
    kept = TopKLogits(*valid_top_k())
    again = pickle.loads(pickle.dumps(copy.deepcopy(kept)))
    student = random_logits(2, 11, seed=2)
    assert VanillaKD(1.0, 0.0)(student, again).item() == VanillaKD(1.0, 0.0)(student, kept).item()


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None


def served(t, tokens, k, form):
    """What a server returns for these tokens: None, then for each token its log-probability and the top k."""
    answer = [None]
    for position, token in enumerate(tokens[1:].tolist()):
        p = t[position].log_softmax(-1)
        ids = [token, *p.topk(k).indices.tolist()]
        answer.append([(p[i].item(), i, f"text of {i}") for i in ids] if form == "tuples" else dict.fromkeys(ids))
        if form != "tuples":
            wrap = {"numbers": float, "objects": Logprob, "json": lambda x: {"logprob": x, "rank": 1}}[form]
            answer[-1] = {str(i) if form == "json" else i: wrap(p[i].item()) for i in ids}
    return answer


@pytest.mark.parametrize("form", ["numbers", "objects", "json", "tuples"])
def test_served_rows_are_compared_over_their_tokens_and_a_bucket(form):
    teacher, student, tokens = (
        random_logits(6, 11),
        random_logits(6, 11, seed=1).requires_grad_(),
        torch.tensor([3, 10, 2, 9, 1, 4]),
    )
    tokens[3] = teacher[2].argmax()  # this token is also among the top k
    kept = TopKLogits.from_served(served(teacher, tokens, 2, form), vocabulary=11)
    named = [sorted({tokens[i + 1].item(), *teacher[i].topk(2).indices.tolist()}) for i in range(5)]
    assert [sorted(x for x in row if x >= 0) for row in kept.indices.tolist()] == [*named, []]
    assert len({len(x) for x in named}) == 2  # rows of different lengths
    expected = torch.zeros(())
    for i, ids in enumerate(named):
        p, q = teacher[i].softmax(-1), student[i].softmax(-1)
        p, q = (torch.cat([x[ids], 1 - x[ids].sum()[None]]) for x in (p, q))
        expected = expected + (p * (p / q).log()).sum() / 5
    value = VanillaKD(1.0, 0.0, causal=True)(student[None], kept.at(lambda t: t[None]), tokens[None])
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(x, student)[0].double() for x in (value, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["numbers", "tuples"])
def test_served_texts_of_a_batch_are_padded_at_the_right(form):
    teacher, tokens = random_logits(6, 11), torch.tensor([3, 10, 2, 9, 1, 4])
    long, short = (served(teacher, tokens[:n], 2, form) for n in (6, 3))
    both = TopKLogits.from_served([long, short])
    assert both.shape == (2, 6, 3)
    one = TopKLogits.from_served(short)
    k = one.shape[-1]
    assert torch.equal(both.indices[1, :3, :k], one.indices)
    assert torch.equal(both.log_probs[1, :3, :k], one.log_probs)
    assert (both.indices[1, 3:] == -1).all()
    in_place = TopKLogits.from_served([long], of="logits")
    assert (in_place.indices[0, 0] == -1).all()
    assert torch.equal(in_place.indices[0, 1:], both.indices[0, :-1])
    empty = TopKLogits.from_served([None, None])
    assert empty.shape == (2, 1)
    assert VanillaKD(1.0, 0.0)(random_logits(2, 11), empty).item() == 0


def test_served_rows_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"\[None, \*rows\], or of='logits'"):
        TopKLogits.from_served([{1: -0.5}, {2: -0.1}])
    with pytest.raises(ValueError, match="choose one of"):
        TopKLogits.from_served([None, {2: -0.1}], of="text")
    for wrong in ("text", {1: -0.5}, [], 3):
        with pytest.raises(TypeError, match="one row for each token"):
            TopKLogits.from_served(wrong)
    for row in ({"token": -0.5}, {1: None}, {1: {"rank": 1}}, "row", [3]):
        with pytest.raises(TypeError, match="a row is None, a mapping"):
            TopKLogits.from_served([None, row])
    with pytest.raises(ValueError, match="more than 1"):
        TopKLogits.from_served([None, {1: 3.5, 2: 1.0}])


@pytest.mark.parametrize("tail", TAILS)
def test_both_sides_over_few_classes_are_the_same_with_one_axis_of_positions_or_several(tail):
    student, teacher = random_logits(3, 2, 2, 11, seed=3), random_logits(3, 2, 2, 11, seed=4)
    kept = TopKLogits.of(teacher, 3, tail=tail)
    rows = TopKLogits.of(teacher.flatten(0, 2), 3, tail=tail)
    for many, flat in zip(kept.against(student), rows.against(student.flatten(0, 2)), strict=True):
        torch.testing.assert_close(many.flatten(0, 2), flat)


def test_one_class_and_all_others_together_have_no_probability_above_1():
    for only in (0, 3):
        with pytest.raises(ValueError, match="more than 1"):
            TopKLogits(torch.tensor([[only]]), torch.tensor([[0.9]]).log(), log_rest=torch.tensor([0.9]).log())


def test_an_index_below_minus_1_is_refused_with_and_without_a_vocabulary():
    for vocabulary, words in ((None, "classes"), (5, "5 classes, 0 to 4")):
        with pytest.raises(ValueError, match=f"is -3, outside the {words}; an empty slot has an index of -1"):
            TopKLogits(torch.tensor([[0, -3]]), torch.tensor([[-1.0, -2.0]]), vocabulary=vocabulary)


# -- mixtures --


@pytest.mark.parametrize("weights", [None, [0.2, 0.8, 0.0]])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_mixture_is_the_weighted_average_of_logits_of_any_kind(weights, average):
    hidden, head = random_logits(4, 3, seed=2), random_logits(11, 3, seed=3)
    lazy = LazyLogits(hidden, head, softcap=5.0)
    teachers = [random_logits(4, 11, seed=1), lazy, random_logits(4, 11, seed=5)]
    t = np.stack([x.numpy() for x in (teachers[0], lazy.dense(), teachers[2])])
    w = np.array(weights or [1 / 3] * 3)[:, None, None]
    mixed = (w * t).sum(0)
    if average == "probabilities":
        mixed = 2.0 * np.log((w * np.exp(oracles.log_softmax(t, 2.0))).sum(0))
    student = random_logits(4, 11)
    ours = loss_and_slope(student, Mixture(teachers, weights, average), 2.0)
    agrees(ours, lambda z: oracles.forward_kl(z, mixed, 2.0), student)
    criterion = kdloss.MultiTeacherKD(weights, 2.0, 0.0, average=average)
    assert criterion(student, teachers).item() == pytest.approx(ours[0].mean().item(), rel=1e-12)


def test_a_mixture_keeps_small_differences_between_logits_far_from_0():
    student, first, second = 1e4 + torch.randint(0, 200, (3, 4, 11)) / 1024  # exact in float32
    exact = oracles.log_softmax(np.stack([x.double().numpy() for x in (first, second)]), 0.3)
    mixed = 0.3 * np.log(0.25 * np.exp(exact[0]) + 0.75 * np.exp(exact[1]))
    mixture = Mixture([first, second], [0.25, 0.75])
    for some in (student, torch.cat([student] * 500)):
        many = mixture if len(some) == 4 else Mixture([torch.cat([x] * 500) for x in mixture.teachers], [0.25, 0.75])
        value = kdloss.divergences.forward_kl(some, many, temperature=0.3)
        exact = oracles.forward_kl(student.double().numpy(), mixed, 0.3)
        np.testing.assert_allclose(value[:4], exact, rtol=1e-5)


def test_invalid_mixtures_are_refused():
    a, b = torch.zeros(2, 5), torch.zeros(2, 5)
    cases = [
        (ValueError, "at least one teacher", ([],)),
        (ValueError, "1 weights for 2 teachers", ([a, b], [1.0])),
        (ValueError, "non-negative and sum to 1", ([a, b], [1.5, -0.5])),
        (ValueError, "non-negative and sum to 1", ([a, b], [0.5, 0.6])),
        (ValueError, "non-negative and sum to 1", ([a, b], [float("nan"), 1.0])),
        (ValueError, "choose one of", ([a, b], None, "probs")),
        (ValueError, r"teacher 1 has logits \(2, 6\)", ([a, torch.zeros(2, 6)],)),
        (ValueError, "teacher 1 has logits .* on meta", ([a, b.to("meta")],)),
        (TypeError, "teacher 1 must be floating point", ([a, b.long()],)),
        (TypeError, "teacher 0 must be a tensor", ([TopKLogits.of(a, 2), b],)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            Mixture(*arguments)


# -- different vocabularies --


def test_truncate_compares_the_renormalised_prefix_of_every_kind():
    hidden, weight, bias = random_logits(4, 3, seed=2), random_logits(14, 3, seed=3), random_logits(14, seed=4)
    lazy = LazyLogits(hidden, weight, bias)
    t = lazy.dense()
    student = random_logits(4, 11)
    criterion = VanillaKD(2.0, 0.0, vocabulary=kdloss.truncate, reduction="none")
    targets = [
        t,
        lazy,
        Mixture([lazy, t]),
        *(TopKLogits.of(t, 14, tail=tail, temperature=2.0) for tail in TAILS),
    ]
    for target in targets:
        ours = loss_and_slope(student, target, 2.0, vocabulary=kdloss.truncate)
        agrees(ours, lambda z: oracles.forward_kl(z, t[:, :11].numpy(), 2.0), student, 1e-9)
        short, _ = kdloss.truncate(student, target)
        assert short is student or short.shape == student.shape
    wide = random_logits(4, 14, seed=6)
    ours = loss_and_slope(wide, t[:, :11], 2.0, vocabulary=kdloss.truncate)
    agrees(ours, lambda z: oracles.forward_kl(z[:, :11], t[:, :11].numpy(), 2.0), wide)
    assert not ours[1][:, 11:].any()
    narrow = LazyLogits(hidden, weight[:9], bias[:9])
    assert criterion(narrow, t).tolist() == pytest.approx(
        oracles.forward_kl(narrow.dense().numpy(), t[:, :9].numpy(), 2.0).tolist(), rel=1e-9
    )


@pytest.mark.parametrize("with_rest", [True, False], ids=["with log_rest", "without log_rest"])
def test_truncate_keeps_the_mass_of_the_rest_of_top_k_logits(with_rest):
    """Classes 0 to 4 of 6 are shared; the teacher stores 0, 1 and 5, so classes 2 to 4 are the rest."""
    p = torch.tensor([[0.4, 0.1, 0.1, 0.06, 0.04, 0.3]], dtype=torch.float64)
    kept = TopKLogits.of(p.log(), 3)
    assert sorted(kept.indices[0].tolist()[:2]) == [0, 5]
    rest = kept.log_rest if with_rest else None
    indices = torch.tensor([[0, 5, 1]])
    kept = TopKLogits(
        indices,
        p[0, indices].log(),
        log_rest=None if rest is None else torch.tensor([0.2], dtype=torch.float64).log(),
        vocabulary=6,
    )
    student = random_logits(1, 5)

    def oracle(z):
        log_q = oracles.log_softmax(z)
        log_q = np.stack([log_q[:, 0], log_q[:, 1], np.log(np.exp(log_q[:, 2:]).sum(-1))], -1)
        log_p = np.log(np.array([[0.4, 0.1, 0.2]]) / 0.7)
        return (np.exp(log_p) * (log_p - log_q)).sum(-1)

    agrees(loss_and_slope(student, kept, vocabulary=kdloss.truncate), oracle, student, 1e-9)


def test_top_k_logits_of_an_unknown_vocabulary_are_not_mapped():
    kept = TopKLogits(torch.tensor([[0, 5]]), torch.tensor([[0.5, 0.4]]).log())
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="vocabulary="):
        VanillaKD(alpha=0.0, vocabulary=TokenMap(ids, ids))(torch.zeros(1, 8), kept)
    for classes in (4, 8):  # with 4, one id is beyond the student's classes
        with pytest.raises(ValueError, match=r"TopKLogits\(\.\.\., vocabulary=number of the teacher's classes\)"):
            VanillaKD(alpha=0.0, vocabulary=kdloss.truncate)(torch.zeros(1, classes), kept)


@pytest.fixture(scope="module")
def tokenizers():
    """One byte-level BPE in two vocabularies, as in GPT-2 and OPT: special tokens at the start shift all ids."""
    made = []
    for specials in ([], ["<s>", "<pad>", "</s>", "<unk>"]):
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=specials, show_progress=False)
        end = "</s>" if specials else "<|endoftext|>"
        bpe.add_special_tokens([end])
        made.append(PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end))
    return made


@since_transformers_5  # older tokenizers learn other merges from this text
def test_two_real_tokenizers_are_mapped_by_token_string_and_end_of_text(tokenizers):
    student, teacher = tokenizers
    shared = TokenMap.of(student, teacher)
    s, t = shared.student_ids.tolist(), shared.teacher_ids.tolist()
    assert s == sorted(s)
    assert len(set(s)) == len(set(t)) == len(s)
    assert len(s) > 350
    assert s != t  # the special tokens at the start shift every id
    end = student.eos_token_id
    for i, j in zip(s, t, strict=True):
        if i == end:
            assert j == teacher.eos_token_id
        else:
            assert student.convert_ids_to_tokens(i) == teacher.convert_ids_to_tokens(j)
    assert end in s
    text = "Applies a linear transformation to the incoming data: numbers and arrays."
    ids = torch.tensor([student(text)["input_ids"]])
    assert shared.to_teacher(ids).tolist() == [teacher(text)["input_ids"]]
    assert TokenMap.of(student.get_vocab(), teacher.get_vocab()).student_ids.tolist() == [i for i in s if i != end]


def test_losses_over_a_token_map_compare_the_mapped_tokens(tokenizers):
    student_tokenizer, teacher_tokenizer = tokenizers
    shared = TokenMap.of(student_tokenizer, teacher_tokenizer)
    s, t = shared.student_ids.numpy(), shared.teacher_ids.numpy()
    hidden, head = random_logits(3, 4, seed=2), random_logits(len(teacher_tokenizer), 4, seed=3)
    lazy = LazyLogits(hidden, head)
    teacher, student = lazy.dense(), random_logits(3, len(student_tokenizer))
    assert teacher.shape != student.shape
    targets = [
        teacher,
        lazy,
        Mixture([teacher, lazy]),
        *(TopKLogits.of(teacher, len(teacher_tokenizer), tail=x, temperature=2.0) for x in TAILS),
    ]

    def oracle(z):
        return oracles.forward_kl(z[:, s], teacher.numpy()[:, t], 2.0)

    exact = oracles.gradient(oracle, student.numpy())
    for target in targets:
        values, slope = loss_and_slope(student, target, 2.0, vocabulary=shared)
        np.testing.assert_allclose(values, oracle(student.numpy()), rtol=1e-8)
        np.testing.assert_allclose(slope, exact, rtol=0, atol=1e-8 * abs(exact).max())
    several = kdloss.MultiTeacherKD(temperature=2.0, alpha=0.0, vocabulary=shared)
    assert several(student, [teacher, lazy]).item() == pytest.approx(oracle(student.numpy()).mean(), rel=1e-12)
    labels = torch.tensor([len(student_tokenizer) - 1, -100, 3])  # ids of the student's vocabulary
    with_ce = VanillaKD(2.0, 0.3, vocabulary=shared)(student, teacher, labels)
    keep = [0, 2]
    ce = oracles.cross_entropy(student.numpy()[keep], labels.numpy()[keep])
    assert with_ce.item() == pytest.approx((0.3 * ce + 0.7 * oracle(student.numpy())[keep]).mean(), rel=1e-12)
    with pytest.raises(ValueError, match=r"kdloss\.TokenMap\.of|TokenMap\.of\(student_tokenizer"):
        VanillaKD(alpha=0.0)(student, teacher)


def test_impossible_token_maps_are_refused():
    shared = TokenMap.of({"a": 0, "b": 1, "only here": 2}, {"<s>": 0, "b": 1, "a": 2})
    assert shared.to_teacher(torch.tensor([[0, 1], [1, 1]])).tolist() == [[2, 1], [1, 1]]
    assert shared.to_teacher(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
    for unknown in (2, 7, -100, -1):
        with pytest.raises(ValueError, match=rf"tokens \[{unknown}\] of the student"):
            shared.to_teacher(torch.tensor([0, unknown]))
    with pytest.raises(ValueError, match="share no token"):
        TokenMap.of({"a": 0}, {"b": 0})
    with pytest.raises(ValueError, match="two lists of one length"):
        TokenMap(torch.arange(3), torch.arange(2))
    with pytest.raises(ValueError, match="nothing is broadcast"):
        VanillaKD(alpha=0.0, vocabulary=shared)(torch.zeros(2, 3), torch.zeros(3, 3))


def test_a_token_map_that_names_a_class_twice_is_refused_with_both_ids():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="student id 1 is paired twice, with teacher ids 0 and 2"):
        TokenMap(torch.tensor([1, 0, 1]), ids)
    with pytest.raises(ValueError, match="teacher id 5 is paired twice, with student ids 1 and 2"):
        TokenMap(ids, torch.tensor([4, 5, 5]))
    with pytest.raises(ValueError, match=r"student_ids has -1.*leave out"):
        TokenMap(ids - 1, ids)
    with pytest.raises(ValueError, match="teacher id 7 is paired twice, with student ids 0 and 1"):
        TokenMap.of({"a": 0, "b": 1}, {"a": 7, "b": 7})


def test_end_of_text_tokens_are_paired_though_another_token_has_the_same_name():
    class Tokenizer:
        def __init__(self, eos_token_id, **vocabulary):
            self.eos_token_id, self.get_vocab = eos_token_id, lambda: vocabulary

    student = Tokenizer(3, a=0, end=1, b=2, stop=3)  # its token "end" is not its end of text
    teacher = Tokenizer(0, end=0, b=1, a=2)
    mapped = TokenMap.of(student, teacher)
    assert dict(zip(mapped.student_ids.tolist(), mapped.teacher_ids.tolist(), strict=True)) == {0: 2, 2: 1, 3: 0}
