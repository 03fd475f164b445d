"""A separate temperature for the teacher, around any divergence."""

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from losses import sample

import kdloss
from kdloss import LazyLogits, TopKLogits
from kdloss.divergences import with_teacher_temperature
from kdloss.targets import Mixture

NAMES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "total_variation", "alpha_divergence", "renyi")
INNER = [getattr(kdloss.divergences, name) for name in (*NAMES, "ab_divergence", "triangular", "adaptive_kl", "uld")]
every_inner = pytest.mark.parametrize("inner", INNER, ids=lambda f: f.__name__)


def grad(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs)


def in_criterion(divergence, student, teacher, temperature):
    return kdloss.VanillaKD(temperature, 0.0, divergence=divergence, reduction="sum")(student, teacher)


@every_inner
def test_value_and_gradient_are_zero_only_where_the_softened_logits_are_equal(inner):
    _, teacher = sample(4, 7)
    loss = with_teacher_temperature(inner, 4.0)
    student = (teacher * 0.5).requires_grad_()  # exact: powers of 2
    for value in (loss(student, teacher, temperature=2.0), in_criterion(loss, student, teacher, 2.0)):
        assert not value.any()
        assert grad(value, student)[0].abs().max() < 1e-6
    assert (loss(teacher, teacher, temperature=2.0) > 1e-3).all()


@every_inner
@pytest.mark.parametrize("temperatures", [(1.0, 4.0), (3.0, 0.7), (100.0, 20.0)])
def test_value_and_gradient_are_those_of_softmaxes_at_two_temperatures(inner, temperatures):
    student, teacher = sample(4, 7, dtype=torch.float64)
    for_student, for_teacher = temperatures
    # The inner divergence at T = 1, on divided logits; the factor T² has the student's temperature.
    size = for_student**2 if "t_squared" in inspect.signature(inner).parameters else 1.0
    expected = size * inner(student / for_student, teacher / for_teacher)
    slope = grad(expected, student)
    loss = with_teacher_temperature(inner, for_teacher)
    lazy = LazyLogits(student.detach().requires_grad_(), torch.eye(7, dtype=torch.float64))
    for value, leaf in (
        (loss(student, teacher, temperature=for_student), student),
        (in_criterion(loss, student, teacher, for_student), student),
        (loss(student, LazyLogits(teacher, torch.eye(7, dtype=torch.float64)), temperature=for_student), student),
        *([] if inner is kdloss.divergences.uld else [(loss(lazy, teacher, temperature=for_student), lazy.hidden)]),
    ):
        torch.testing.assert_close(value.sum(), expected.sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad(value, leaf), slope, rtol=1e-7, atol=1e-10)


def test_a_teacher_temperature_equal_to_the_students_changes_nothing():
    student, teacher = sample(4, 7)
    plain = kdloss.divergences.forward_kl
    for value, expected in (
        (
            with_teacher_temperature(plain, 3.0)(student, teacher, temperature=3.0),
            plain(student, teacher, temperature=3.0),
        ),
        (
            in_criterion(with_teacher_temperature(plain, 3.0), student, teacher, 3.0),
            in_criterion(plain, student, teacher, 3.0),
        ),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad(value, student), grad(expected, student), rtol=1e-5, atol=1e-6)


def test_options_labels_and_schedules_reach_the_inner_divergence():
    student, teacher = sample(4, 7, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, -100])
    loss = with_teacher_temperature(partial(kdloss.divergences.jsd, beta=0.1, t_squared=False), 4.0)
    expected = kdloss.divergences.jsd(student / 2, teacher / 4, beta=0.1).sum()
    torch.testing.assert_close(in_criterion(loss, student, teacher, 2.0), expected)
    again = partial(loss, beta=0.3, t_squared=True)
    expected = 4 * kdloss.divergences.jsd(student / 2, teacher / 4, beta=0.3).sum()
    torch.testing.assert_close(in_criterion(again, student, teacher, 2.0), expected)
    labelled = with_teacher_temperature(kdloss.divergences.dkd, 4.0)
    expected = 4 * kdloss.divergences.dkd(student / 2, teacher / 4, labels).sum()
    value = kdloss.VanillaKD(2.0, 0.0, divergence=labelled, reduction="sum")(student, teacher, labels)
    torch.testing.assert_close(value, expected)
    falling = kdloss.VanillaKD(kdloss.schedules.linear(2.0, 1.0, steps=2), 0.0, divergence=loss, reduction="sum")
    falling(student, teacher)
    falling.advance()
    falling.advance()
    expected = kdloss.divergences.jsd(student, teacher / 4, beta=0.1).sum()
    torch.testing.assert_close(falling(student, teacher), expected)


def test_the_wrapped_divergence_keeps_its_closed_form_and_can_be_copied_and_pickled():
    for inner, has_closed_form in ((kdloss.divergences.forward_kl, True), (kdloss.divergences.adaptive_kl, False)):
        loss = with_teacher_temperature(inner, 4.0)
        assert (loss.closed_form is not None) == has_closed_form
        for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
            assert twin == loss
        assert "t_squared" in inspect.signature(loss).parameters


def test_without_a_temperature_the_student_has_that_of_the_wrapped_divergence():
    student, teacher = sample(4, 7)
    for inner, temperature in (
        (kdloss.divergences.forward_kl, 1.0),
        (partial(kdloss.divergences.jsd, temperature=3.0), 3.0),
    ):
        loss = with_teacher_temperature(inner, 4.0)
        torch.testing.assert_close(loss(student, teacher), loss(student, teacher, temperature=temperature))


@pytest.mark.parametrize(
    "wrap", [kdloss.divergences.standardized, partial(with_teacher_temperature, teacher_temperature=4.0)]
)
def test_a_wrapper_cannot_be_changed_in_place(wrap):
    loss = wrap(kdloss.divergences.forward_kl)
    with pytest.raises(FrozenInstanceError):
        loss.divergence = kdloss.divergences.reverse_kl
    assert {loss: "found"}[wrap(kdloss.divergences.forward_kl)] == "found"


def test_small_differences_of_large_logits_are_precise():
    student, teacher = 1e4 + torch.randint(0, 200, (2, 4, 9)) / 1024
    loss = with_teacher_temperature(kdloss.divergences.forward_kl, 0.07)
    exact = loss(student.double(), teacher.double(), temperature=0.05)
    torch.testing.assert_close(loss(student, teacher, temperature=0.05).double(), exact, rtol=1e-5, atol=0)
    value = in_criterion(loss, student, teacher, 0.05)
    torch.testing.assert_close(value.double(), exact.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["logit_mse", "bernoulli_kl"])
def test_divergences_that_cannot_use_a_teacher_temperature_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no use for a teacher's temperature"):
        with_teacher_temperature(getattr(kdloss.divergences, name), 4.0)
    standardized = kdloss.divergences.standardized(kdloss.divergences.forward_kl)
    with pytest.raises(ValueError, match=r"standardized\(with_teacher_temperature"):
        with_teacher_temperature(standardized, 4.0)
    with pytest.raises(TypeError, match=r"forward_kl, 4\.0"):
        with_teacher_temperature("forward_kl", 4.0)
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        with_teacher_temperature(kdloss.divergences.forward_kl, 0.0)


def test_teachers_that_hold_probabilities_at_a_fixed_temperature_are_refused():
    student, teacher = sample(4, 7)
    loss = with_teacher_temperature(kdloss.divergences.forward_kl, 4.0)
    for target in (TopKLogits.of(teacher, 3), Mixture([teacher, student.detach()])):
        for way in (loss, partial(in_criterion, loss, temperature=1.0)):
            with pytest.raises(ValueError, match=r"with_teacher_temperature.*compares logits"):
                way(student, target)
