"""The Sinkhorn divergence between class distributions."""

import copy
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from losses import on_a_line, sample

import kdloss
from kdloss import LazyLogits, TopKLogits
from kdloss.divergences import sinkhorn
from kdloss.engine import transport
from kdloss.engine.task import as_written

INF = float("inf")


def grad(value, *inputs, **options):
    return torch.autograd.grad(value.sum(), inputs, **options)


def run(way, loss, student, teacher, temperature=1.0):
    student = student.detach().clone().requires_grad_()
    if way == "plain":
        value = as_written(loss)(student, teacher, temperature=temperature).sum()
    else:
        value = kdloss.VanillaKD(temperature, 0.0, divergence=loss, reduction="sum")(student, teacher)
    return value.detach(), grad(value, student)[0]


both_ways = pytest.mark.parametrize("way", ["plain", "closed form"])


def test_sinkhorn_is_the_wasserstein_distance_for_small_epsilon_and_a_kernel_distance_for_large():
    student, teacher = sample(6, 5, dtype=torch.float64)
    cost = on_a_line(5)
    q, p = student.softmax(-1), teacher.softmax(-1)
    wasserstein = (q - p).cumsum(-1).abs().sum(-1) / 4  # of distributions on a line
    value = sinkhorn(student, teacher, cost=cost, epsilon=0.004, iterations=5000)
    torch.testing.assert_close(value, wasserstein, rtol=0, atol=0.004)
    kernel = ((p - q) @ -cost * (p - q)).sum(-1) / 2
    value = sinkhorn(student, teacher, cost=cost, epsilon=1e4)
    torch.testing.assert_close(value, kernel, rtol=1e-3, atol=0)
    torch.testing.assert_close(grad(value, student), grad(kernel, student), rtol=1e-2, atol=1e-4)


def test_a_mistake_for_a_more_distant_class_costs_more():
    near, far, teacher = (torch.eye(4)[k].mul(50) for k in (1, 3, 0))
    loss = partial(sinkhorn, cost=on_a_line(4).float())
    assert loss(near, teacher).item() == pytest.approx(1 / 3, abs=1e-3)
    assert loss(far, teacher).item() == pytest.approx(1.0, abs=1e-3)


@both_ways
@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_value_and_gradient_equal_the_oracle_after_many_iterations(way, epsilon):
    student, teacher = (x.detach() for x in sample(3, 5, dtype=torch.float64))
    points = torch.randn(5, 3, dtype=torch.float64)
    cost = torch.cdist(points, points).square()
    cost = (cost + cost.T) / cost.max() / 2
    loss = partial(sinkhorn, cost=cost, epsilon=epsilon, iterations=1500)
    value, slope = run(way, loss, student, teacher, 2.0)
    s, t = student.numpy(), teacher.numpy()
    oracle = partial(
        oracles.sinkhorn, temperature=2.0, epsilon=epsilon, cost=cost.numpy(), steps=1000 if epsilon > 0.1 else 3000
    )
    np.testing.assert_allclose(value, oracle(s, t).sum(), rtol=1e-9)
    np.testing.assert_allclose(slope, oracles.gradient(lambda x: oracle(x, t), s), rtol=1e-6, atol=1e-9)


@both_ways
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_large_logits_and_excluded_classes_give_finite_and_precise_values(way, temperature):
    student, teacher = 1e4 * torch.rand(2, 4, 6).mul(2).sub(1)
    student[0, :2], teacher[0, 1:3], student[1, 5], teacher[1, 5] = -INF, -INF, -INF, -INF
    loss = partial(sinkhorn, cost=on_a_line(6).float())
    value, slope = run(way, loss, student, teacher, temperature)
    exact, exact_slope = run("plain", loss, student.double(), teacher.double(), temperature)
    assert value.isfinite().all()
    torch.testing.assert_close(value.double(), exact.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-4, atol=1e-4 * max(1.0, temperature))
    assert not slope[1, 5].any()


@both_ways
@pytest.mark.parametrize("temperature", [2.0, 100.0])
def test_near_the_teacher_sinkhorn_is_about_as_precise_as_forward_kl(way, temperature):
    teacher = 3 * torch.randn(4, 16)
    student = teacher + 0.1 * torch.randn(4, 16)
    cost = on_a_line(16).float()
    errors = []
    for loss in (partial(sinkhorn, cost=cost), kdloss.divergences.forward_kl):
        value, slope = run(way, loss, student, teacher, temperature)
        exact, exact_slope = run("plain", loss, student.double(), teacher.double(), temperature)
        errors.append((abs(value / exact - 1), (slope - exact_slope).norm() / exact_slope.norm()))
    ours, theirs = errors
    assert ours[0] <= 6 * theirs[0] + 1e-5
    assert ours[1] <= 6 * theirs[1] + 1e-5


@both_ways
def test_sinkhorn_is_exactly_zero_at_the_teacher_after_few_iterations(way):
    _, teacher = sample(4, 7)
    for iterations in (1, 3):
        loss = partial(sinkhorn, cost=on_a_line(7).float(), epsilon=0.05, iterations=iterations)
        value, slope = run(way, loss, teacher, teacher, 2.0)
        assert value == 0
        assert not slope.any()


def test_lazy_students_have_the_loss_of_dense_ones_and_nan_stays_nan():
    student, teacher = sample(4, 7, dtype=torch.float64)
    loss = partial(sinkhorn, cost=on_a_line(7))
    value = loss(LazyLogits(student, torch.eye(7, dtype=torch.float64)), teacher, temperature=2.0)
    torch.testing.assert_close(value, loss(student, teacher, temperature=2.0))
    broken = teacher.clone()
    broken[0, 0] = float("nan")
    for way in ("plain", "closed form"):
        value, slope = run(way, loss, broken, teacher)
        assert value.isnan()
        assert slope[0].isnan().all()
        assert slope[1:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cost": torch.zeros(4, 4)}, r"cost has shape \(4, 4\); logits of 3 classes need \(3, 3\)"),
        ({"cost": torch.ones(3, 3)}, "0 from each class to itself"),
        ({"cost": torch.tensor([[0, 1, 2], [1, 0, INF], [2, INF, 0]])}, "must be finite"),
        ({"cost": -on_a_line(3)}, "nowhere negative"),
        ({"cost": on_a_line(3).triu()}, r"symmetric; write \(cost \+ cost\.T\) / 2"),
        ({"cost": 100 * on_a_line(3)}, r"epsilon=0\.1 is too small for costs of up to 100: write cost / cost\.max\(\)"),
        ({"cost": torch.tensor([[0, 0.01, 1], [0.01, 0, 0.01], [1, 0.01, 0]])}, "positive semi-definite"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"iterations": 0}, "iterations must be a whole number"),
    ],
)
def test_invalid_costs_and_settings_are_refused_with_a_remedy(change, words):
    loss = partial(sinkhorn, **{"cost": on_a_line(3), **change})
    for way in ("plain", "closed form"):
        with pytest.raises(ValueError, match=words):
            run(way, loss, torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_cost_is_checked_once_and_again_after_it_changed(monkeypatch):
    checks = []
    monkeypatch.setattr(transport, "_look", lambda *args: checks.append(args))
    cost = on_a_line(3)
    for _ in range(3):
        sinkhorn(torch.zeros(2, 3), torch.zeros(2, 3), cost=cost)
    assert len(checks) == 1
    cost.mul_(2)
    sinkhorn(torch.zeros(2, 3), torch.zeros(2, 3), cost=cost)
    assert len(checks) == 2


def test_a_top_k_teacher_with_a_bucket_is_refused_with_a_remedy():
    student, teacher = sample(4, 7)
    with pytest.raises(ValueError, match=r"sinkhorn.*tail='uniform'"):
        sinkhorn(student, TopKLogits.of(teacher, 3), cost=on_a_line(7).float())


def test_a_criterion_with_a_cost_can_be_copied():
    student, teacher = sample(4, 7)
    criterion = kdloss.VanillaKD(2.0, 0.0, divergence=partial(sinkhorn, cost=on_a_line(7).float()))
    assert torch.equal(copy.deepcopy(criterion)(student, teacher), criterion(student, teacher))
