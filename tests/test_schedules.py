"""Schedules of weights and temperatures: formulas, exact ends, bounds, copies, equality and errors."""

import copy
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdloss import schedules
from kdloss.schedules import at, constant, cosine, exponential, linear, warmup

CURVES = {"linear": linear, "cosine": cosine, "exponential": exponential}
SCHEDULES = [
    constant(0.5),
    linear(4, 1, 10),
    cosine(1, 0, 10),
    exponential(8, 1, 10),
    warmup(5, 0.5),
    warmup(5, cosine(1, 0, 10)),
]
positive = st.floats(1e-6, 1e6)
curves = st.sampled_from(list(CURVES.values()))


# Values


def test_each_curve_equals_its_formula():
    steps = np.arange(9)
    progress = np.minimum(steps / 6, 1)
    expected = {
        "linear": 5 - 3 * progress,
        "cosine": 2 + 3 * (1 + np.cos(np.pi * progress)) / 2,
        "exponential": 5 * (2 / 5) ** progress,
    }
    for name, curve in CURVES.items():
        np.testing.assert_allclose([curve(5, 2, 6)(int(k)) for k in steps], expected[name], rtol=1e-14)


def test_values_equal_those_computed_by_hand():
    assert [linear(0, 1, 4)(k) for k in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [cosine(2, 0, 2)(k) for k in range(4)] == [2, 1, 0, 0]
    assert [round(exponential(1, 16, 4)(k), 12) for k in range(6)] == [1, 2, 4, 8, 16, 16]
    assert [constant(-3)(k) for k in (0, 10**9)] == [-3, -3]


def test_a_cosine_is_flat_at_both_ends_and_a_line_is_not():
    for curve, flat in ((cosine, True), (linear, False)):
        values = [curve(1, 0, 1000)(k) for k in (0, 1, 999, 1000)]
        assert (values[0] - values[1] < 1e-5) is flat
        assert (values[2] - values[3] < 1e-5) is flat


def test_an_exponential_changes_by_a_constant_factor():
    values = [exponential(9, 0.1, 20)(k) for k in range(21)]
    factors = {round(b / a, 10) for a, b in itertools.pairwise(values)}
    assert factors == {round((0.1 / 9) ** (1 / 20), 10)}


def test_a_warmup_rises_to_a_number_and_stays_there():
    assert [warmup(4, 2)(k) for k in range(6)] == [0, 0.5, 1, 1.5, 2, 2]
    assert warmup(0, 2)(0) == 2


def test_after_a_warmup_the_other_schedule_continues_from_the_current_step():
    then = cosine(1, 0, 10)
    schedule = warmup(4, then)
    assert [schedule(k) for k in range(4)] == [k / 4 * then(4) for k in range(4)]
    assert [schedule(k) for k in range(4, 12)] == [then(k) for k in range(4, 12)]
    nested = warmup(2, warmup(4, lambda step: float(step)))
    assert [nested(k) for k in range(6)] == [0, 1, 2, 3, 4, 5]


def test_negative_steps_have_the_value_of_step_0():
    for schedule in SCHEDULES:
        assert schedule(-3) == schedule(0)


# Bounds


@given(curves, positive, positive, st.integers(1, 50))
def test_both_ends_are_exact_and_values_stay_constant_after_the_end(curve, start, end, steps):
    schedule = curve(start, end, steps)
    assert schedule(0) == start
    assert {schedule(steps), schedule(steps + 1), schedule(10**9)} == {end}


@given(curves, positive, positive, st.integers(1, 50))
def test_values_are_monotonic_and_stay_between_the_ends(curve, start, end, steps):
    values = [curve(start, end, steps)(k) for k in range(steps + 2)]
    assert all(min(start, end) <= value <= max(start, end) for value in values)
    assert values == sorted(values, reverse=start > end)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(1, 50))
def test_lines_and_cosines_may_cross_zero(start, end, steps):
    for curve in (linear, cosine):
        values = [curve(start, end, steps)(k) for k in range(steps + 1)]
        assert values == sorted(values, reverse=start > end)
        mean = (values[0] + values[-1]) / 2
        if steps % 2 == 0:
            assert math.isclose(values[steps // 2], mean, rel_tol=1e-9, abs_tol=1e-9 * (abs(start) + abs(end)))


@given(st.integers(1, 50), positive)
def test_a_warmup_to_a_number_is_a_line_from_zero(steps, value):
    for k in range(steps + 2):
        assert math.isclose(warmup(steps, value)(k), linear(0, value, steps)(k), rel_tol=1e-12)


# Copies, equality, printing and use as a setting


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_copies_and_pickles_are_equal_and_give_the_same_values(schedule):
    for twin in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert [twin(k) for k in range(12)] == [schedule(k) for k in range(12)]


def test_schedules_are_equal_if_their_settings_are_equal():
    assert linear(1, 0, 10) == linear(1.0, 0.0, np.int64(10))
    different = [*SCHEDULES, linear(4, 1, 11), linear(4, 2, 10), linear(5, 1, 10), cosine(4, 1, 10), warmup(5, 0.25)]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_prints_as_the_code_that_creates_it(schedule):
    assert eval(repr(schedule), vars(schedules)) == schedule


class Weighed(nn.Module):
    def __rmul__(self, weight):
        return weight


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_product_of_a_schedule_and_a_module_is_left_to_the_module(schedule):
    assert schedule * Weighed() is schedule
    with pytest.raises(TypeError, match="unsupported operand"):
        schedule * nn.Linear(1, 1)


def test_a_setting_is_a_number_or_a_function_of_the_step():
    numbers = [2, 0.5, np.float32(0.5), np.int64(3)]
    assert [at(number, 7) for number in numbers] == [2, 0.5, 0.5, 3]
    assert {type(at(number, 7)) for number in numbers} == {float}
    assert at(linear(0, 1, 10), 7) == 0.7
    assert at(functools.partial(pow, 2), 3) == 8
    assert type(at(lambda step: np.float32(step), 3)) is float


# Errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_function_that_returns_no_finite_number_is_refused_with_step_and_value(value):
    with pytest.raises(ValueError, match=rf"at step 12 must be finite, got {value}"):
        at(lambda step: value, 12)
    with pytest.raises(ValueError, match="at step 4 must be finite"):
        warmup(4, lambda step: value)(1)
    with pytest.raises(ValueError, match="must be finite"):
        at(value, 12)


@pytest.mark.parametrize("value", [None, "1", True, 1j, [1.0]])
def test_a_function_that_returns_no_number_is_refused_with_step_and_type(value):
    with pytest.raises(TypeError, match=rf"at step 12 must be a number, got {type(value).__name__}"):
        at(lambda step: value, 12)
    with pytest.raises(TypeError, match="a setting must be a number"):
        at(value, 12)


def test_a_tensor_is_refused_because_every_step_would_wait_for_the_device():
    with pytest.raises(TypeError, match=r"got Tensor: tensor\(1\.\); write \.item\(\) once"):
        at(lambda step: torch.tensor(1.0), 0)
    with pytest.raises(TypeError, match=r"write \.item\(\)"):
        linear(torch.tensor(1.0), 0, 10)


@pytest.mark.parametrize("name", CURVES)
def test_ends_that_are_not_finite_numbers_are_refused_and_named(name):
    curve = CURVES[name]
    with pytest.raises(TypeError, match=rf"{name}\(start\) must be a number, got str: '1'$"):
        curve("1", 2, 3)
    with pytest.raises(TypeError, match=rf"{name}\(end\) must be a number, got bool"):
        curve(1, True, 3)
    with pytest.raises(ValueError, match=rf"{name}\(end\) must be finite, got nan; write a number"):
        curve(1, math.nan, 3)


def test_other_values_that_are_not_finite_numbers_are_refused_and_named():
    with pytest.raises(TypeError, match=r"constant\(value\) must be a number, got NoneType"):
        constant(None)
    with pytest.raises(ValueError, match=r"constant\(value\) must be finite"):
        constant(math.inf)
    with pytest.raises(TypeError, match=r"warmup\(then\) must be a number, got str"):
        warmup(3, "linear")


@pytest.mark.parametrize("name", [*CURVES, "warmup"])
def test_steps_that_are_no_integer_or_too_small_are_refused_with_an_example(name):
    make = functools.partial(CURVES[name], 1, 2) if name in CURVES else functools.partial(warmup, then=1)
    for steps in (1.5, "3", None, True, 10.0):
        with pytest.raises(TypeError, match=rf"{name}\(steps\) must be an integer, got {steps!r}; write .*steps=1000"):
            make(steps=steps)
    least = 1 if name in CURVES else 0
    with pytest.raises(ValueError, match=rf"{name}\(steps\) must be {least} or more, got {least - 1}; write"):
        make(steps=least - 1)


@pytest.mark.parametrize("ends", [(0, 1), (1, 0), (-1, -2)])
def test_an_exponential_with_an_end_at_or_below_zero_is_refused_with_alternatives(ends):
    with pytest.raises(ValueError, match=r"both ends must be above 0, got start=.*1e-3, or linear or cosine"):
        exponential(*ends, 10)
