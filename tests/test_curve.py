"""A curve stores values without reading them, and distinguishes pitfalls from noise."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from watching import never_waiting

import kdloss
from kdloss import CrossEntropy, Features, Logits, Sum
from kdloss.analysis import Curve
from kdloss.analysis._trend import Trend


def curve_of(**terms):
    """A curve from arrays with one number per step. The name "feature_3" means "feature/3"."""
    curve = Curve()
    for numbers in zip(*terms.values(), strict=True):
        curve.add({name.replace("_", "/"): x for name, x in zip(terms, map(float, numbers), strict=True)})
    return curve


def decay(steps, start, end, tau):
    return end + (start - end) * np.exp(-np.arange(steps) / tau)


def noisy(values, scatter, seed=0):
    return values * np.random.default_rng(seed).lognormal(-(scatter**2) / 2, scatter, len(values))


def told(curve, **options):
    return [(symptom.term, symptom.text) for symptom in curve.symptoms(**options)]


# -- stored values --


def test_values_stay_tensors_until_they_are_read(monkeypatch):
    monkeypatch.setattr("kdloss.analysis.curve.MOST", 8)
    curve, numbers = Curve(), torch.arange(50.0).unbind()
    with never_waiting():
        for x in numbers:
            curve.add({"kd": x, "ce": x.bfloat16()})
    assert all(isinstance(x, torch.Tensor) for point in curve._points for x in point.sums.values())
    assert curve.values["kd"][0] == 0
    assert not any(isinstance(x, torch.Tensor) for point in curve._points for x in point.sums.values())
    curve.add({"kd": numbers[7]})
    assert set(curve.values) == {"kd", "ce"}


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 400), most=st.integers(2, 40), seed=st.integers(0, 99))
def test_beyond_the_limit_neighbouring_points_are_averaged_and_the_first_point_is_not(steps, most, seed):
    x = np.random.default_rng(seed).normal(size=steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdloss.analysis.curve.MOST", most)
        curve = curve_of(kd=x)
    width = 1
    while 1 + math.ceil((steps - 1) / width) > most:
        width *= 2
    runs = [(0, 1), *((i, min(i + width, steps)) for i in range(1, steps, width))]
    np.testing.assert_allclose(curve.values["kd"], [x[a:b].mean() for a, b in runs], rtol=1e-12, atol=1e-12)
    assert curve.steps["kd"] == [(a + b - 1) / 2 for a, b in runs]


def test_a_parameter_is_stored_with_its_value_at_that_step():
    curve, temperature = Curve(), nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    for _ in range(3):
        curve.add({"T": temperature})
        with torch.no_grad():
            temperature -= 1
    assert curve.values == {"T": [4, 3, 2]}
    assert not any(x.requires_grad for point in curve._points for x in point.sums.values() if torch.is_tensor(x))


def test_terms_may_be_missing_at_some_steps():
    curve = Curve()
    for numbers in ({"ce": 1.0}, {"ce": 2, "kd": 5.0}, {}, {"kd": 6.0}):
        curve.add(numbers)
    assert curve.values == {"ce": [1, 2], "kd": [5, 6]}
    assert curve.steps == {"ce": [0, 1], "kd": [1, 3]}


def test_values_added_to_the_same_step_are_averaged():
    curve = Curve()
    for step, x in [(0, 1.0), (0, 3.0), (1, 5.0), (1, 7.0), (1, 9.0)]:
        curve.add({"kd": x}, step=step)
    assert (curve.steps["kd"], curve.values["kd"]) == ([0, 1], [2, 7])


def test_a_run_resumed_from_an_earlier_step_drops_the_later_values(monkeypatch):
    curve = Curve()
    for step in range(6):
        curve.add({"kd": step})
    curve.add({"kd": 30}, step=3)
    curve.add({"kd": 40})
    assert (curve.steps["kd"], curve.values["kd"]) == ([0, 1, 2, 3, 4], [0, 1, 2, 30, 40])
    monkeypatch.setattr("kdloss.analysis.curve.MOST", 3)
    for step in range(5, 9):
        curve.add({"kd": step})
    curve.add({"kd": 50}, step=1)
    curve.add({"kd": 60})
    assert (curve.steps["kd"], curve.values["kd"]) == ([0, 1.5], [0, 55])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda curve: pickle.loads(pickle.dumps(curve))])
def test_a_copy_does_not_change_the_original(duplicate):
    curve = Curve()
    curve.add({"kd": torch.tensor(1.0)})
    assert b"torch" not in pickle.dumps(curve)
    curve.add({"kd": torch.tensor(3.0)}, step=0)
    other = duplicate(curve)
    other.add({"kd": torch.tensor(2.0)})
    assert other.values == {"kd": [2, 2]}
    assert curve.values == {"kd": [2]}


def test_values_that_are_not_numbers_are_refused_and_not_stored():
    curve = Curve()
    criterion = kdloss.VanillaKD()
    step = kdloss.Distillation(nn.Linear(4, 3), nn.Linear(4, 3), criterion)(
        torch.ones(2, 4), labels=torch.ones(2).long()
    )
    with pytest.raises(TypeError, match=r"'logits' is a tensor of shape \(2, 3\); write curve\.add\(out\.components\)"):
        curve.add(step)
    with pytest.raises(TypeError, match="'kd' is a str"):
        curve.add({"ce": 1.0, "kd": "1"})
    with pytest.raises(TypeError, match="float"):
        curve.add({"ce": 1.0}, step=0.5)
    assert curve.values == {}
    assert curve.symptoms() == []
    curve.add(step.components)
    curve.add(criterion.components)
    assert list(curve.values) == ["ce", "kd"]


# -- trends --


@given(seed=st.integers(0, 99), steps=st.integers(50, 300))
@settings(max_examples=20, deadline=None)
def test_a_trend_is_the_fall_from_the_first_to_the_last_tenth_with_its_standard_error(seed, steps):
    x = 5 + np.random.default_rng(seed).normal(size=steps)
    trend, n = Trend.of(x.tolist()), steps // 10
    size = max(x[:n].mean(), x[-n:].mean())
    assert trend.fall == pytest.approx((x[:n].mean() - x[-n:].mean()) / size)
    assert trend.error == pytest.approx(np.sqrt(x[:n].var(ddof=1) / n + x[-n:].var(ddof=1) / n) / size)


WORDS = {
    "falls": noisy(decay(200, 3, 1, 60), 0.1),
    "rises": noisy(np.linspace(1, 2, 200), 0.1),
    "stays": noisy(np.ones(400), 0.02),
    "unclear": noisy(np.ones(60), 0.6, seed=4),
    "short": np.linspace(2, 1, 49),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_table_has_a_line_for_each_term_with_its_trend(word):
    x = WORDS[word]
    head, line = str(curve_of(kd=x)).splitlines()
    assert head.split() == ["term", "values", "first", "last", "lowest", "trend"]
    n = len(x) // 10
    assert line.split() == ["kd", str(len(x)), *(f"{y:.4g}" for y in (x[0], x[-n:].mean(), x.min())), word]


def test_a_table_lists_factors_and_layers_below_the_terms():
    names = ["feature/0-1", "feature/1-3", "feature", "feature/balance", "kd", "kd/share", "kd/balance"]
    curve = Curve()
    curve.add(dict.fromkeys(names, 1.0))
    listed = [line.split()[0] for line in str(curve).splitlines()[1:]]
    factors = ["kd/share", "feature/balance", "kd/balance"]
    assert listed == ["feature", "kd", *factors, "feature/0-1", "feature/1-3"]


# -- symptoms --

N = 400
LEARNED = noisy(decay(N, 3, 1, 80), 0.1)
STUCK = noisy(np.ones(N), 0.05, seed=1)
VERY_NOISY = noisy(np.ones(N), 0.5, seed=2)
ONE_NAN = np.where(np.arange(N) == 120, np.nan, LEARNED)
ILL = {
    "features that stay flat": ({"ce": LEARNED, "feature": STUCK}, "feature", "hardly falls, .*while ce learned"),
    "features that fall a little": (
        {"ce": LEARNED, "kd": LEARNED, "feature": STUCK * np.linspace(1.1, 1, N)},
        "feature",
        "hardly falls, .*while ce and kd learned",
    ),
    "features as the only term": ({"feature": STUCK}, "feature", "hardly falls, from 1"),
    "features that rise": ({"feature": STUCK * np.linspace(1, 2, N)}, "feature", "rises, from 1"),
    "one layer that stays flat": (
        {"feature": LEARNED, "feature_0-1": LEARNED, "feature_2-5": STUCK},
        "feature",
        "but not at 2-5$",
    ),
    "kd that stays flat": ({"ce": LEARNED, "kd": STUCK}, "kd", "hardly falls, from 1"),
    "kd that rises": ({"ce": LEARNED, "kd": STUCK * np.linspace(1, 2, N)}, "kd", "rises, from 1"),
    "labels ignored": ({"ce": noisy(np.linspace(2, 3, N), 0.1), "kd": LEARNED}, "ce", "rises, .*while kd learned"),
    "labels that are forgotten": (
        {"ce": STUCK * np.linspace(1, 1.3, N), "kd": VERY_NOISY},
        "ce",
        "rises, from 1[.0-9]* to 1[.0-9]*$",
    ),
    "labels not learned": ({"ce": noisy(np.full(N, 2.0), 0.01), "kd": LEARNED}, "ce", "hardly falls, .*kd learned"),
    "not finite": ({"ce": LEARNED, "kd": ONE_NAN}, "kd", "kd is nan at step 120$"),
    "no labels": ({"ce": np.zeros(N), "kd": LEARNED}, "ce", "ce is 0 throughout"),
    "identical teacher": ({"ce": LEARNED, "kd": np.zeros(N)}, "kd", "kd is 0 throughout"),
}


@pytest.mark.parametrize("name", ILL)
def test_a_pitfall_is_reported_with_its_causes(name):
    terms, term, text = ILL[name]
    (symptom,) = curve_of(**terms).symptoms()
    assert symptom.term == term
    assert re.search(text, symptom.text)
    first, *rest = str(symptom).splitlines()
    assert first == symptom.text
    assert rest == [f"  - {cause}: {cure}" for cause, cure in symptom.causes.items()]
    assert rest


def flat(n):
    return np.ones(n)


HEALTHY = {
    "all fall": lambda n: {"ce": decay(n, 3, 1, n / 5), "kd": decay(n, 2, 1, n / 4), "feature": decay(n, 2, 1, n / 3)},
    "all fall at once, then stay flat": lambda n: dict.fromkeys(["ce", "kd", "feature"], decay(n, 2.5, 1, 2)),
    "all fall within a tenth, then stay flat": lambda n: dict.fromkeys(["ce", "kd", "feature"], decay(n, 3, 1, n / 25)),
    "features converge first": lambda n: {"ce": decay(n, 3, 1, n / 4), "feature": decay(n, 2.5, 1, 2)},
    "ce converges first": lambda n: {"ce": decay(n, 2.5, 1, 2), "kd": decay(n, 2, 1, n / 4)},
    "a plateau, then a fall": lambda n: dict.fromkeys(
        ["ce", "kd", "feature"], np.where(np.arange(n) < n / 2, 2.0, 1.0)
    ),
    "a likelihood below 0": lambda n: {"ce": decay(n, 3, 1, n / 5), "feature": decay(n, 1, -2, n / 5)},
    "flat terms with other names": lambda n: {
        "ce": decay(n, 3, 1, n / 5),
        "mine": flat(n),
        "lr": flat(n),
        "kd/balance": flat(n),
    },
    "ce that drops, then rises a little": lambda n: {
        "ce": decay(n, 3, 1, 2) * np.linspace(1, 1.3, n),
        "kd": decay(n, 2, 1, n / 4),
    },
    "ce with little to gain": lambda n: {"ce": decay(n, 1.05, 1, n / 10), "kd": decay(n, 2, 1, n / 4)},
    "features that fall a little, with a flat layer": lambda n: {
        "feature": decay(n, 1.2, 1, n / 5),
        "feature/0-1": flat(n),
    },
    "ce as the only term": lambda n: {"ce": flat(n)},
}


@pytest.mark.parametrize("name", HEALTHY)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    steps=st.integers(50, 3000),
    scatter=st.floats(0.0, 0.15),
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-6, 1e6),
)
def test_a_healthy_training_has_no_symptom(name, steps, scatter, seed, scale):
    rng = np.random.default_rng(seed)
    terms = {
        term: scale * (x + np.abs(x) * scatter * rng.normal(size=steps)) for term, x in HEALTHY[name](steps).items()
    }
    curve = Curve()
    for numbers in zip(*terms.values(), strict=True):
        curve.add(dict(zip(terms, numbers, strict=True)))
    assert told(curve) == []


def test_no_symptom_is_reported_where_noise_could_hide_a_fall():
    very_noisy = noisy(np.ones(60), 0.5)
    assert told(curve_of(ce=LEARNED[:60], kd=very_noisy, feature=very_noisy)) == []
    assert told(curve_of(ce=LEARNED[:49], kd=STUCK[:49], feature=STUCK[:49])) == []


@given(scale=st.floats(1e-6, 1e6), name=st.sampled_from(sorted(ILL)))
@settings(max_examples=30, deadline=None)
def test_a_symptom_does_not_depend_on_the_scale_of_the_losses(scale, name):
    terms, term, _ = ILL[name]
    scaled = curve_of(**{name: scale * x for name, x in terms.items()})
    assert [reported for reported, _ in told(scaled)] == [term]


def test_flat_terms_of_a_resumed_run_are_no_symptom():
    curve = Curve()
    for step in range(N):
        curve.add({"ce": STUCK[step], "kd": STUCK[step], "feature": STUCK[step]}, step=10_000 + step)
    assert told(curve) == []


def test_a_teacher_worse_than_its_student_is_reported():
    curve = curve_of(ce=LEARNED, kd=LEARNED)
    assert told(curve) == told(curve, teacher_loss=0.9) == []
    ((term, text),) = told(curve, teacher_loss=torch.tensor(1.3))
    assert term == "ce"
    assert text.endswith("and the teacher's is 1.3")
    very_noisy = noisy(np.ones(60), 0.5)
    assert told(curve_of(ce=very_noisy), teacher_loss=1.03 * very_noisy[-6:].mean()) == []


def test_a_criterion_shows_the_kinds_of_its_terms_and_which_of_them_a_schedule_changes():
    curve = curve_of(labels=LEARNED, soft=STUCK, hidden=STUCK)
    terms = CrossEntropy(name="labels"), Logits(name="soft"), Features("last", name="hidden")
    assert told(curve) == []
    assert [term for term, _ in told(curve, criterion=Sum(*terms))] == ["hidden", "soft"]
    cooling = Logits(name="soft", temperature=kdloss.schedules.linear(4.0, 1.0, steps=N))
    assert [term for term, _ in told(curve, criterion=Sum(terms[0], cooling))] == []


def test_a_model_in_place_of_a_criterion_is_refused():
    model = kdloss.Distillation(nn.Linear(4, 3), nn.Linear(4, 3), kdloss.VanillaKD())
    with pytest.raises(TypeError, match=r"kdloss\.Sum.*got Distillation; write model\.criterion"):
        Curve().symptoms(model)


@pytest.mark.parametrize(
    ("weight", "dominates"), [(1.0, True), (0.01, False), (kdloss.schedules.constant(0.02), True), (0.0, False)]
)
def test_features_that_dominate_the_loss_are_recognised_by_their_weights(weight, dominates):
    curve = curve_of(ce=LEARNED, kd=LEARNED, feature=1000 * LEARNED)
    criterion = 0.3 * CrossEntropy() + 0.7 * Logits() + weight * Features("last")
    assert [term for term, _ in told(curve, criterion=criterion)] == ["feature"] * dominates
    balanced = curve_of(ce=LEARNED, kd=LEARNED, feature=1000 * LEARNED, feature_balance=np.full(N, 1e-3))
    assert told(balanced, criterion=criterion) == []
    falling = curve_of(ce=LEARNED, kd=LEARNED, feature=1000 * LEARNED, feature_balance=np.geomspace(1, 1e-3, N))
    assert told(falling, criterion=criterion) == []


def test_a_term_that_remains_after_all_others_are_learned_does_not_dominate():
    curve = curve_of(ce=decay(N, 3, 1e-3, 20), feature=decay(N, 2, 0.5, 20))
    assert told(curve, criterion=CrossEntropy() + Features("last")) == []
    scheduled = kdloss.schedules.linear(1.0, 0.0, steps=N) * CrossEntropy() + Features("last")
    scheduled.step = N
    assert told(curve_of(ce=LEARNED, feature=LEARNED), criterion=scheduled) == []


def test_a_rising_held_out_loss_is_reported_from_the_lines_of_a_trainers_log():
    curve = Curve()
    losses = [3.0, 2.5, 2.3, 2.4, 2.5, 2.6]
    for n, loss in enumerate(losses, start=1):
        curve.add({"loss": 1 / n, "ce": 1 / n, "learning_rate": 1e-3, "epoch": n / 2}, step=10 * n)
        curve.add({"eval_loss": loss, "eval_kd": loss, "epoch": n / 2}, step=10 * n)
    ((term, text),) = told(curve)
    assert term == "eval_loss"
    assert text == "eval_loss was lowest at step 30: 2.3, and ends at 2.6"
    falling = Curve()
    for loss in [3.0, 2.5, 2.3, 2.2, 2.4, 2.21]:
        falling.add({"eval_loss": loss})
    assert told(falling) == []


def test_a_term_with_nan_in_several_layers_is_reported_once():
    curve = curve_of(ce=LEARNED, feature=STUCK, feature_0=ONE_NAN, feature_1=ONE_NAN)
    assert told(curve) == [("feature", "feature/0 is nan at step 120")]


# -- a real training --


def mlp(width):
    layers = [nn.Sequential(nn.Linear(n, width), nn.Tanh()) for n in (8, width)]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def batches(steps):
    """Normal inputs, with labels from a random network of 24 hidden units."""
    generator = torch.Generator().manual_seed(0)
    hidden, out = torch.randn(8, 24, generator=generator), torch.randn(24, 5, generator=generator)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator)
        yield x, ((x @ hidden).tanh() @ out).argmax(-1)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = mlp(32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, labels in batches(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("forgotten", [False, True])
def test_projections_outside_the_optimizer_are_reported_in_a_real_training(teacher, distance, forgotten):
    distance = getattr(kdloss.distances, distance)
    criterion = kdloss.FeatureKD(["1"], pairing="same", alpha=0.3, logit_weight=1.0, temperature=1.0, distance=distance)
    model = kdloss.Distillation(mlp(6), teacher, criterion).prepare(torch.zeros(2, 8))
    optimizer = torch.optim.Adam((model.student if forgotten else model).parameters(), 1e-2)
    curve = Curve()
    for x, labels in batches(200):
        out = model(x, labels=labels)
        out.loss.backward()
        optimizer.step()
        model.zero_grad()
        curve.add(out.components)
    assert [term for term, _ in told(curve)] == ["feature"] * forgotten
    assert told(curve, criterion=criterion) == told(curve)
    if forgotten:
        assert "projections that no optimizer has" in curve.symptoms()[0].causes


# -- pictures --


def test_a_picture_has_panels_for_the_terms_their_factors_and_the_layers_of_each_term(tmp_path):
    from matplotlib.figure import Figure

    names = ["ce", "feature/0-1", "feature/1-3", "feature", "kd", "kd/balance"]
    curve = Curve()
    for step in range(90):
        curve.add({name: torch.tensor(1.0 + step) for name in names}, step=2 * step)
    figure = Figure()
    curve.draw(figure)
    panels = {axes.get_ylabel(): [text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes}
    assert panels == {"terms": ["ce", "feature", "kd"], "balance": ["kd/balance"], "feature": ["0-1", "1-3"]}
    raw, smooth = figure.axes[0].lines[:2]
    assert raw.get_xydata().tolist() == [[2 * i, 1 + i] for i in range(90)]
    assert smooth.get_ydata()[[0, 45]].tolist() == [2, 46]  # the mean over 90 / 40 = 2 points on either side
    assert figure.axes[0].get_yscale() == "log"
    curve.add({"ce": 0.0})
    figure = Figure()
    curve.draw(figure)
    assert figure.axes[0].get_yscale() == "linear"
    curve.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    Curve().draw(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
