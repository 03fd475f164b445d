"""Extreme numbers, compared with mpmath and float64."""

import importlib
from dataclasses import replace

import device
import mpmath
import numpy as np
import oracles
import pytest
import torch
from losses import DISTANCES, DIVERGENCES, ONE_EACH, TOLERANCE, labels_for

import kdloss
from kdloss.engine.task import as_written, unwrapped

at_once = importlib.import_module("kdloss.engine.at_once")
CLOSED = [x for x in ONE_EACH if getattr(unwrapped(x.function)[0], "closed_form", None) is not None]
AS_WRITTEN = [
    replace(x, name=f"{x.name}-as written", function=written)
    for x in CLOSED
    if (written := as_written(x.function)) is not x.function
]
every_divergence = pytest.mark.parametrize("loss", [*ONE_EACH, *AS_WRITTEN], ids=str)
INF = float("inf")
FORWARD, REVERSE = (next(x for x in ONE_EACH if x.name.startswith(n)) for n in ("forward_kl", "reverse_kl"))


@pytest.fixture(autouse=True)
def float64_for_few(monkeypatch):
    """Compute few logits with the precision of many; returns a function that restores float64 for them."""
    monkeypatch.setattr(at_once, "FEW", 0)
    return lambda: monkeypatch.setattr(at_once, "FEW", 2**12)


def absolute_tolerance(loss, dtype):
    """The absolute tolerance; positive for losses made of differences of probabilities, which float32 rounds."""
    rough = loss.exempt & {"kink", "relational"}
    return max(1.0, loss.scale) * TOLERANCE[dtype] / 10 if rough else 0.0


def ours_and_oracle(loss, student, teacher, temperature=None):
    """Value and gradient of the loss, then those of the float64 oracle."""
    student, loss = student.clone().requires_grad_(), loss if temperature is None else loss.at(temperature)
    value = loss.call(student, teacher)
    slope = torch.autograd.grad(value.sum(), student)[0]
    s, t = student.detach().double().numpy(), teacher.double().numpy()
    with np.errstate(invalid="ignore"):  # for logits of -inf the oracles compute inf - inf
        exact = loss.expected(s, t)
        exact_slope = loss.slope(s, t)
    return value.detach(), slope, exact, exact_slope


@every_divergence
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_of_1e4_at_any_temperature_agree_with_float64(loss, temperature, dtype):
    logits = 1e4 * torch.rand(2, 4, 9).mul(2).sub(1)
    student, teacher = logits.to(dtype)
    value, slope, exact, exact_slope = ours_and_oracle(loss, student, teacher, temperature)
    rounding = max(TOLERANCE[dtype], torch.finfo(dtype).eps)
    # Other devices draw other numbers. If both sides are certain of one class, the oracle may be below float32's range.
    least = 0.0 if device.NAME == "cpu" else 1e-12 * abs(exact).max()
    np.testing.assert_allclose(value, exact, rtol=TOLERANCE[dtype], atol=absolute_tolerance(loss, dtype) + least)
    size = max(abs(exact_slope).max(), exact.max() / temperature)  # a saturated softmax has gradients of 1e-27
    atol = rounding * size + absolute_tolerance(loss, dtype)
    np.testing.assert_allclose(slope.double(), exact_slope, rtol=rounding, atol=atol)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("low_side", ["student", "teacher"])
def test_a_class_with_almost_no_probability_on_one_side_gives_the_right_loss_and_gradient(loss, temperature, low_side):
    logits = torch.rand(3, 60)  # many similar logits: their exponentials have a large sum
    low, other = logits.clone(), logits.flip(1)
    low[:, 5], other[:, 5] = (
        -temperature * torch.tensor([70.0, 90.0, 300.0]),
        temperature * torch.tensor([0.0, 3.0, 9.0]),
    )
    student, teacher = (low, other) if low_side == "student" else (other, low)
    value, slope, exact, exact_slope = ours_and_oracle(loss, student, teacher, temperature)
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=absolute_tolerance(loss, torch.float32))
    size = max(abs(exact_slope).max(), exact.max() / temperature)
    np.testing.assert_allclose(
        slope.double(), exact_slope, rtol=1e-4, atol=1e-5 * size + absolute_tolerance(loss, torch.float32)
    )


@pytest.mark.parametrize("beta", [0.14, 0.5, 0.86])
@pytest.mark.parametrize("behind", ["student", "teacher"])
def test_jsd_keeps_its_digits_where_one_side_excludes_a_class(behind, beta):
    out, other = torch.randn(2, 64, 3)
    out[:, 1] = -INF
    student, teacher = (out, other) if behind == "student" else (other, out)
    value = kdloss.divergences.jsd(student, teacher, temperature=2.0, beta=beta)
    exact = oracles.jsd(student.double().numpy(), teacher.double().numpy(), temperature=2.0, beta=beta)
    np.testing.assert_allclose(value, exact, rtol=3e-6)  # from differences of logarithms of next to nothing: 6e-5


@every_divergence
@pytest.mark.parametrize("temperature", [0.05, 0.3])
def test_small_differences_of_large_logits_are_precise_at_a_low_temperature(loss, temperature):
    student, teacher = 1e4 + torch.randint(0, 200, (2, 4, 9)) / 1024  # exact in float32
    value, slope, exact, exact_slope = ours_and_oracle(loss, student, teacher, temperature)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-4, atol=1e-5 * abs(exact_slope).max())


@pytest.mark.parametrize("loss", [loss for loss in ONE_EACH if "few" not in loss.exempt], ids=str)
@pytest.mark.parametrize("temperature", [20.0, 100.0])
def test_a_large_vocabulary_at_high_temperature_agrees_with_float64(loss, temperature):
    student, teacher = 3 * torch.randn(2, 2, 32_000)
    loss = loss.at(temperature)
    value = loss.call(student, teacher)
    exact = loss.expected(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=absolute_tolerance(loss, torch.float32))


@every_divergence
@pytest.mark.parametrize("temperature", [20.0, 100.0])
def test_a_small_vocabulary_at_high_temperature_agrees_with_float64(loss, temperature):
    student, teacher = 3 * torch.randn(2, 4, 9)
    value, slope, exact, exact_slope = ours_and_oracle(loss, student, teacher, temperature)
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=absolute_tolerance(loss, torch.float32))
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-4, atol=1e-4 * abs(exact_slope).max())


@pytest.mark.parametrize("loss", [FORWARD, REVERSE], ids=str)
def test_at_a_high_temperature_small_gaps_between_logits_keep_their_digits(loss):
    student, teacher = torch.tensor(np.random.default_rng(0).standard_normal((2, 300, 9), np.float32))  # on any device
    value, _, exact, _ = ours_and_oracle(loss, student, teacher, 100.0)
    np.testing.assert_allclose(value, exact, rtol=1e-5)


@pytest.mark.parametrize("loss", [x for x in ONE_EACH if not x.exempt & {"shift", "relational"}], ids=str)
def test_a_class_excluded_by_both_sides_adds_nothing(loss):
    student, teacher = torch.randn(2, 3, 6)
    extra = torch.full((3, 2), -INF)
    value, slope, _, _ = ours_and_oracle(loss, torch.cat([student, extra], 1), torch.cat([teacher, extra], 1), 2.0)
    plain, plain_slope, _, _ = ours_and_oracle(loss, student, teacher, 2.0)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(slope[:, :6], plain_slope)
    assert not slope[:, 6:].any()


def test_a_class_excluded_by_one_side_gives_the_exact_finite_or_infinite_loss():
    half, none = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INF])
    for temperature in (0.5, 1.0, 4.0):
        log_2 = temperature**2 * np.log(2)
        forward, slope, _, _ = ours_and_oracle(FORWARD, half, none, temperature)
        assert forward.item() == pytest.approx(log_2)
        np.testing.assert_allclose(slope, [-temperature / 2, temperature / 2])  # T (q - p)
        assert kdloss.divergences.forward_kl(none, half, temperature=temperature) == INF
        reverse, slope, _, _ = ours_and_oracle(REVERSE, none, half, temperature)
        assert reverse.item() == pytest.approx(log_2)
        assert not slope.any()  # q is (1, 0): its gradient is 0
        assert kdloss.divergences.reverse_kl(half, none, temperature=temperature) == INF


def test_cross_entropy_and_kl_equal_mpmath_with_fifty_digits():
    logits = [3.25, -1.5, 0.125, 7.0]
    with mpmath.workdps(50):
        exact = mpmath.log(sum(mpmath.exp(z) for z in logits)) - mpmath.mpf(logits[1])
        kl = _mpmath_kl(logits, [1.0, 2.0, -0.5, 0.25], 3)
    z = torch.tensor(logits, dtype=torch.float64)
    assert kdloss.cross_entropy(z[None], torch.tensor([1])).item() == pytest.approx(float(exact), rel=1e-14)
    teacher = torch.tensor([1.0, 2.0, -0.5, 0.25], dtype=torch.float64)
    ours = kdloss.divergences.forward_kl(z, teacher, temperature=3.0)
    assert ours.item() == pytest.approx(float(kl), rel=1e-14)
    ours = kdloss.divergences.reverse_kl(teacher, z, temperature=3.0)
    assert ours.item() == pytest.approx(float(kl), rel=1e-14)


def _mpmath_kl(student, teacher, temperature):
    def probabilities(logits):
        e = [mpmath.exp(mpmath.mpf(z) / temperature) for z in logits]
        return [x / sum(e) for x in e]

    p, q = probabilities(teacher), probabilities(student)
    return temperature**2 * sum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("loss", DIVERGENCES, ids=str)
def test_bfloat16_logits_give_the_loss_of_the_same_numbers_in_float32(loss):
    student, teacher = (3 * torch.randn(2, 8, 50)).bfloat16()
    torch.testing.assert_close(loss.call(student, teacher), loss.call(student.float(), teacher.float()))


def close_to_oracle(loss, student, teacher):
    """Compare with the oracle: values to 1e-5, the gradient by the norm of its error."""
    value, slope, exact, exact_slope = ours_and_oracle(loss, student, teacher)
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)
    rounding = 1e-5 if student.dtype == torch.float32 else 2 * torch.finfo(student.dtype).eps
    size = max(np.linalg.norm(exact_slope), 1e-2)
    assert np.linalg.norm(slope.double().numpy() - exact_slope) <= rounding * size


LABELLED = [loss for loss in DIVERGENCES if loss.labelled]


@pytest.mark.parametrize("loss", LABELLED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", [1e4, -1e4, 60.0])
def test_an_extreme_logit_of_the_label_leaves_the_other_classes_precise(loss, dtype, extreme):
    student, teacher = 2 * torch.randn(2, 6, 9).to(dtype)
    label = labels_for(student.shape).unsqueeze(-1)
    for s, t in ((extreme, None), (None, extreme), (extreme, extreme)):
        z, u = (x if logit is None else x.scatter(-1, label, logit) for x, logit in ((student, s), (teacher, t)))
        close_to_oracle(loss, z, u)


@pytest.mark.parametrize("loss", [loss for loss in DIVERGENCES if loss.name.startswith("dist-")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_hardly_vary_over_a_batch_are_correlated_precisely(loss, dtype):
    variation = 1e-3 if dtype == torch.float32 else 2**-6
    flat = (1 + torch.rand(1, 5)).expand(6, 5) + variation * torch.randn(6, 5)
    close_to_oracle(loss, flat.to(dtype), torch.randn(6, 5).to(dtype))
    close_to_oracle(loss, torch.randn(6, 5).to(dtype), flat.to(dtype))


# Distances that need care to be precise here. Of the others only rkd_angle is imprecise: its gradient by up to 2e-5.
RELATED = ("cka", "rkd_distance", "pkt", "similarity", "nst", "cosine", "pkd")


@pytest.mark.parametrize("loss", [x for x in DISTANCES if x.name.startswith(RELATED)], ids=str)
def test_rows_that_are_nearly_equal_or_nearly_constant_are_compared_precisely(loss):
    for seed in range(5):
        torch.manual_seed(seed)
        noise, teacher = torch.randn(2, 8, 9)
        close_to_oracle(loss, torch.randn(1, 9) + 1e-3 * noise, teacher)
        close_to_oracle(loss, torch.randn(8, 1) + 1e-3 * noise, teacher)


@pytest.mark.parametrize("loss", [x for x in ONE_EACH if not x.exempt & {"teacher", "kink", "relational"}], ids=str)
@pytest.mark.parametrize("distance", [0.1, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_a_student_near_its_teacher_is_exact_to_three_digits(loss, distance, temperature):
    student, noise = torch.randn(2, 4, 9)
    teacher = 3 * student + distance * noise
    value, _, exact, _ = ours_and_oracle(loss, 3 * student, teacher, temperature)
    np.testing.assert_allclose(value, exact, rtol=1e-3)


@pytest.mark.parametrize("loss", [x for x in CLOSED if not x.exempt & {"teacher", "kink", "relational"}], ids=str)
@pytest.mark.parametrize("distance", [0.01, 1e-3])
@pytest.mark.parametrize("temperature", [2.0, 50.0])
def test_few_logits_are_compared_in_float64_near_the_teacher(loss, distance, temperature, float64_for_few):
    float64_for_few()
    student, noise = torch.randn(2, 4, 9)
    teacher = 3 * student + distance * noise
    value, slope, exact, exact_slope = ours_and_oracle(loss, 3 * student, teacher, temperature)
    np.testing.assert_allclose(value, exact, rtol=1e-4, atol=2e-8)  # the oracle is no more precise
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-4, atol=1e-5 * np.abs(exact_slope).max())
