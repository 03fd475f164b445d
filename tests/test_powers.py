"""Divergences of powers and squares of probabilities: limits, precision, infinities and second derivatives."""

from functools import cache, partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import sample

import kdloss
from kdloss.divergences import ab_divergence, alpha_divergence, forward_kl, renyi, reverse_kl, triangular
from kdloss.engine.task import as_written

INF = float("inf")
BOTH_FORMS = pytest.mark.parametrize("form", ["plain", "closed form"])
LOSSES = [
    *(partial(alpha_divergence, alpha=a) for a in (-0.5, 0.0, 1e-6, 0.3, 0.5, 1 - 1e-6, 1.0, 1.5)),
    *(partial(renyi, order=a) for a in (1e-6, 0.5, 1 - 1e-6, 1 + 1e-6, 2.0)),
    *(partial(ab_divergence, alpha=a, beta=b) for a, b in ((1e-6, 0.5), (0.5, 1e-6), (1.0, 1.0), (1e-3, 1e-3))),
    *(partial(ab_divergence, alpha=a, beta=b) for a, b in ((0.5, -0.2), (-0.2, 0.5), (0.3, -0.3), (-0.3, 0.3))),
    partial(ab_divergence, alpha=0.0, beta=0.0),
    triangular,
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: f"{name(x)}{sorted(settings_of(x).values())}")


def name(loss):
    return getattr(loss, "func", loss).__name__


def settings_of(loss):
    return getattr(loss, "keywords", {})


def grad(value, *inputs, **options):
    return torch.autograd.grad(value.sum(), inputs, **options)


def run(form, loss, student, teacher, temperature):
    """Return the sum of the values of all rows and its gradient, by the plain function or by a criterion."""
    student = student.detach().clone().requires_grad_()
    if form == "plain":
        value = as_written(loss)(student, teacher, temperature=temperature).sum()
    else:
        value = kdloss.VanillaKD(temperature, 0.0, divergence=loss, reduction="sum")(student, teacher)
    return value.item(), grad(value, student)[0].double().numpy()


def by_mpmath(loss, student, teacher, temperature):
    """Return the same from the definition, computed with 100 digits."""
    value, rows = mpmath.mpf(0), []
    with mpmath.workdps(100):
        T = mpmath.mpf(temperature)
        for logits in zip(student.tolist(), teacher.tolist(), strict=True):
            q, p = ([mpmath.exp(z / T) / sum(mpmath.exp(y / T) for y in row) for z in row] for row in logits)
            f, slope = _definition(loss, q, p)
            value += T**2 * f
            rows.append([float(T * (x - sum(slope) * y)) for x, y in zip(slope, q, strict=True)])
    return float(value), np.array(rows)


def _definition(loss, q, p):
    """Return the divergence, and q times its derivative by q; an exponent of 0 is replaced by 1e-25."""
    pairs, options = list(zip(p, q, strict=True)), {k: mpmath.mpf(x or 1e-25) for k, x in settings_of(loss).items()}
    if name(loss) == "triangular":
        return sum((x - y) ** 2 / (x + y) for x, y in pairs), [
            y * (y - x) * (3 * x + y) / (x + y) ** 2 for x, y in pairs
        ]
    if name(loss) == "renyi":
        a = options["order"]
        terms = [x**a * y ** (1 - a) for x, y in pairs]
        return mpmath.log(sum(terms)) / (a - 1), [-z / sum(terms) for z in terms]
    a = options["alpha"] + (mpmath.mpf(1e-25) if options["alpha"] == 1 else 0)
    b = options["beta"] if name(loss) == "ab_divergence" else 1 - a
    c = a + b + (mpmath.mpf(1e-25) if a + b == 0 else 0)
    terms = [(a / c * x**c + (c - a) / c * y**c - x**a * y ** (c - a)) / (a * (c - a)) for x, y in pairs]
    return sum(terms), [y ** (c - a) * (y**a - x**a) / a for x, y in pairs]


@cache
def relative_errors(form, loss, temperature, distance):
    """Return the relative errors of value and gradient in float32."""
    generator = torch.Generator().manual_seed(3)
    teacher, noise = torch.randn(2, 2, 16, generator=generator)
    teacher, student = 3 * teacher, 3 * teacher + distance * noise
    value, slope = run(form, loss, student, teacher, temperature)
    definition = partial(alpha_divergence, alpha=1.0) if loss is forward_kl else loss
    exact, exact_slope = by_mpmath(definition, student, teacher, temperature)
    return abs(value / exact - 1), np.linalg.norm(slope - exact_slope) / np.linalg.norm(exact_slope)


@BOTH_FORMS
@every_loss
@pytest.mark.parametrize("temperature", [2.0, 100.0])
@pytest.mark.parametrize("distance", [1e-2, 1.0])
def test_near_the_teacher_and_every_limit_a_divergence_is_as_precise_as_forward_kl(loss, form, temperature, distance):
    ours, theirs = (relative_errors(form, f, temperature, distance) for f in (loss, forward_kl))
    assert ours[0] <= 6 * theirs[0] + 1e-6
    assert ours[1] <= 6 * theirs[1] + 1e-6


@every_loss
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.floats(-8, 8, width=32), min_size=12, max_size=12), temperature=st.sampled_from([0.3, 1.0, 20.0])
)
def test_values_are_never_negative_and_both_forms_agree(loss, rows, temperature):
    student, teacher = torch.tensor(rows, dtype=torch.float64).view(2, 2, 3)
    (value, slope), (other_value, other_slope) = (
        run(form, loss, student, teacher, temperature) for form in BOTH_FORMS.args[1]
    )
    assert value >= 0
    assert other_value == pytest.approx(value, rel=1e-9, abs=1e-12)
    rounding = 1e-9 * max(abs(slope).max(), 1e-3) + 1e-14 * value  # a slope may be a difference as large as the value
    np.testing.assert_allclose(other_slope, slope, rtol=1e-7, atol=rounding)


def test_at_known_exponents_alpha_divergence_equals_the_known_divergence():
    student, teacher = sample(4, 7, dtype=torch.float64)
    q, p = student.softmax(-1), teacher.softmax(-1)
    for alpha, expected in (
        (0.0, reverse_kl(student, teacher)),
        (0.5, 2 * (p.sqrt() - q.sqrt()).square().sum(-1)),
        (1.0, forward_kl(student, teacher)),
        (2.0, ((p - q).square() / q).sum(-1) / 2),
        (-1.0, ((p - q).square() / p).sum(-1) / 2),
    ):
        value = alpha_divergence(student, teacher, alpha=alpha)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            grad(value, student), grad(expected, student, retain_graph=True), rtol=1e-8, atol=1e-11
        )
        mirrored = alpha_divergence(teacher, student.detach(), alpha=1 - alpha)
        torch.testing.assert_close(mirrored, value.detach(), rtol=1e-10, atol=0)


def test_at_known_exponents_ab_divergence_equals_the_known_divergence():
    student, teacher = sample(4, 7, dtype=torch.float64)
    q, p = student.softmax(-1), teacher.softmax(-1)
    for alpha, beta, expected in (
        (1.0, 0.0, forward_kl(student, teacher)),
        (0.0, 1.0, reverse_kl(student, teacher)),
        (0.3, 0.7, alpha_divergence(student, teacher, alpha=0.3)),
        (1.0, 1.0, (p - q).square().sum(-1) / 2),
        (0.0, 0.0, (p.log() - q.log()).square().sum(-1) / 2),
        (1.0, -1.0, (p / q - (p / q).log() - 1).sum(-1)),  # Itakura-Saito
    ):
        value = ab_divergence(student, teacher, alpha=alpha, beta=beta)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            grad(value, student), grad(expected, student, retain_graph=True), rtol=1e-8, atol=1e-9
        )


def test_renyi_grows_with_its_order_and_is_forward_kl_at_1():
    student, teacher = sample(4, 7)
    assert torch.equal(renyi(student, teacher, order=1.0), forward_kl(student, teacher))
    values = [renyi(student, teacher, order=order) for order in (0.1, 0.5, 0.999999, 1.0, 1.000001, 2.0, 10.0, 1e3)]
    assert (torch.stack(values).diff(dim=0) >= -1e-6).all()
    limit = (teacher.log_softmax(-1) - student.log_softmax(-1)).amax(-1)  # the limit for large orders
    torch.testing.assert_close(values[-1], limit, rtol=1e-2, atol=0)


@BOTH_FORMS
def test_renyi_is_finite_where_its_sum_overflows_or_underflows(form):
    student, teacher = torch.tensor([[1e4, 0.0, 3.0]]), torch.tensor([[0.0, 1e4, 3.0]])
    value, slope = run(form, partial(renyi, order=2.0), student, teacher, 0.5)
    assert value == pytest.approx(0.25 * 2e4)  # one class: p = 1, log q = -2e4
    np.testing.assert_allclose(slope, [[0.5, -0.5, 0.0]], rtol=1e-3)
    value, slope = run(form, partial(renyi, order=0.5), student, teacher, 0.5)
    assert value == pytest.approx(0.25 * (2e4 - 2 * np.log(2)))  # two classes with e^-1e4
    np.testing.assert_allclose(slope, [[0.25, -0.25, 0.0]], rtol=1e-3)


@BOTH_FORMS
@pytest.mark.parametrize("order", [0.5, 2.0])
def test_a_class_that_both_sides_exclude_adds_nothing_to_renyi(form, order):
    student, teacher = torch.tensor([[0.0, 10.0, -INF]]), torch.tensor([[10.0, 0.0, -INF]])
    value, slope = run(form, partial(renyi, order=order), student, teacher, 1.0)
    expected, its = run(form, partial(renyi, order=order), student[:, :2], teacher[:, :2], 1.0)
    assert value == pytest.approx(expected)
    np.testing.assert_allclose(slope, [[*its[0], 0.0]], rtol=1e-5)


@BOTH_FORMS
def test_the_value_where_one_side_excludes_a_class_is_finite_or_infinite_as_defined(form):
    uniform, one_class = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -INF]])
    for loss, q_excludes, p_excludes in (
        (triangular, 2 / 3, 2 / 3),
        (partial(alpha_divergence, alpha=0.5), 4 - 8**0.5, 4 - 8**0.5),
        (partial(alpha_divergence, alpha=1.0), INF, np.log(2)),
        (partial(alpha_divergence, alpha=0.0), np.log(2), INF),
        (partial(alpha_divergence, alpha=2.0), INF, 0.5),
        (partial(alpha_divergence, alpha=-1.0), 0.5, INF),
        (partial(renyi, order=0.5), np.log(2), np.log(2)),
        (partial(renyi, order=1.0), INF, np.log(2)),
        (partial(renyi, order=2.0), INF, np.log(2)),
        (partial(ab_divergence, alpha=1.0, beta=1.0), 0.25, 0.25),
        (partial(ab_divergence, alpha=1.0, beta=0.0), INF, np.log(2)),
        (partial(ab_divergence, alpha=0.0, beta=1.0), np.log(2), INF),
        (partial(ab_divergence, alpha=0.5, beta=-0.2), INF, None),
        (partial(ab_divergence, alpha=-0.2, beta=0.5), None, INF),
        (partial(ab_divergence, alpha=0.3, beta=-0.3), INF, INF),
        (partial(ab_divergence, alpha=-0.3, beta=0.3), INF, INF),
        (partial(ab_divergence, alpha=0.0, beta=0.0), INF, INF),
    ):
        for student, teacher, expected in ((one_class, uniform, q_excludes), (uniform, one_class, p_excludes)):
            value, slope = run(form, loss, student, teacher, 1.0)
            assert value == (pytest.approx(expected, rel=1e-6) if expected else pytest.approx(value)), loss
            assert np.isfinite(value) == (expected != INF)
            assert expected == INF or np.isfinite(slope).all(), loss


@BOTH_FORMS
@every_loss
def test_nan_among_logits_gives_nan_in_value_and_gradient(form, loss):
    student, teacher = torch.tensor([[0.0, float("nan"), 1.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    for s, t in ((student, teacher), (teacher, student)):
        value, slope = run(form, loss, s, t, 2.0)
        assert np.isnan(value)
        assert np.isnan(slope).all()


@every_loss
@pytest.mark.parametrize("distance", [0.0, 1e-7, 0.1])
def test_second_derivatives_are_correct_at_the_teacher_and_near_it(loss, distance):
    _, teacher = sample(1, 4, dtype=torch.float64)
    teacher, direction = teacher / 3, torch.tensor([[1.0, -0.5, 0.25, 2.0]], dtype=torch.float64)
    student = (teacher + distance * direction).requires_grad_()
    slope = grad(loss(student, teacher, temperature=1.5), student, create_graph=True)[0]
    for v in range(4):
        row = grad(slope[0, v], student, retain_graph=True)[0]
        steps = []
        for step in (1e-4, -1e-4):
            moved = student.detach().clone()
            moved[0, v] += step
            steps.append(by_mpmath(loss, moved, teacher, 1.5)[1])
        np.testing.assert_allclose(row[0], (steps[0] - steps[1])[0] / 2e-4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (
            partial(ab_divergence, alpha=0.2, beta=-0.3),
            ValueError,
            r"alpha \+ beta must be 0 or more, got 0.2 and -0.3",
        ),
        (partial(ab_divergence, beta=INF), ValueError, "beta must be finite, got inf"),
        (partial(alpha_divergence, alpha=float("nan")), ValueError, "alpha must be finite"),
        (partial(alpha_divergence, alpha="half"), TypeError, "alpha must be a number, got 'half'"),
        (partial(renyi, order=0.0), ValueError, "order must be above 0, got 0.0"),
    ],
)
def test_invalid_exponents_are_refused_and_named(loss, error, words):
    for form in BOTH_FORMS.args[1]:
        with pytest.raises(error, match=words):
            run(form, loss, torch.zeros(2, 3), torch.zeros(2, 3), 2.0)


@every_loss
def test_t_squared_multiplies_value_and_gradient(loss):
    student, teacher = sample(4, 7, dtype=torch.float64)
    value, plain = (loss(student, teacher, temperature=3.0, t_squared=flag) for flag in (True, False))
    torch.testing.assert_close(value, 9 * plain)
    torch.testing.assert_close(grad(value, student)[0], 9 * grad(plain, student)[0])
