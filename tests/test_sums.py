"""Laws of sums: arithmetic with terms, against plain torch."""

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from terms import TERMS, Batch, Confidence, by_hand, close, grad, kl, made
from torch import nn

import kdloss
from kdloss import (
    CrossEntropy,
    FeatureKD,
    Features,
    LazyLogits,
    Logits,
    MultiTeacherKD,
    Sum,
    Task,
    VanillaKD,
    divergences,
)
from kdloss.schedules import linear, warmup

every_term = pytest.mark.parametrize("name", TERMS)
either_way = pytest.mark.parametrize("causal", [False, True])


# -- one term --


@every_term
@either_way
@pytest.mark.parametrize("masked", [False, True])
def test_a_term_is_its_weight_times_its_mean_over_the_counted_positions(name, causal, masked):
    batch = Batch(causal)
    mask = batch.mask if masked else None
    expected = 0.3 * by_hand(name, batch, mask).mean()
    criterion = Sum(0.3 * made(name), causal=causal)
    close(criterion(*batch.args(), mask=mask), expected, batch)


@pytest.mark.parametrize("name", [name for name in TERMS if name not in ("ce", "smooth")])
@either_way
def test_a_term_with_positions_mask_counts_unlabelled_positions_and_another_term_does_not(name, causal):
    batch = Batch(causal)
    other = "kd" if name == "own" else "own"
    criterion = Sum(made(name, positions="mask"), 2.0 * made(other), causal=causal)
    expected = by_hand(name, batch, batch.mask, by_mask=True).mean() + 2 * by_hand(other, batch, batch.mask).mean()
    close(criterion(*batch.args(), mask=batch.mask), expected, batch)


def test_cross_entropy_with_positions_mask_needs_soft_labels():
    batch, criterion = Batch(), 1.0 * CrossEntropy(positions="mask")
    with pytest.raises(ValueError, match=r"'ce' counts unlabelled positions.*positions='labels'"):
        criterion(*batch.args(), mask=batch.mask)
    soft = torch.rand(3, 4, 7).double().softmax(-1)
    value = criterion(batch.student, None, soft, mask=batch.mask)
    close(value, -(soft * batch.logits.log_softmax(-1)).sum(-1)[batch.mask].mean(), batch)


@either_way
def test_soft_labels_are_shifted_and_masked_like_labels(causal):
    batch = Batch(causal)
    soft = torch.rand(3, 4, 7).double()
    soft /= soft.sum(-1, keepdim=True)
    value = Sum(CrossEntropy(), causal=causal)(batch.student, None, soft, mask=batch.mask)
    s, y, keep = (batch.logits[:, :-1], soft[:, 1:], batch.mask[:, 1:]) if causal else (batch.logits, soft, batch.mask)
    close(value, -(y * s.log_softmax(-1)).sum(-1)[keep].mean(), batch)


# -- arithmetic --


@pytest.mark.parametrize("weight", [2, 0.5, 0.0, warmup(10, 1.0), lambda step: 0.5, nn.Parameter(torch.tensor(2.0))])
def test_a_term_times_a_weight_is_a_sum_with_the_same_term_object(weight):
    term = Features("last", widths=(4, 8), depths=(2, 3))
    for product in (weight * term, term * weight, weight * (1.0 * term), weight * Sum(term), sum([weight * term])):
        assert isinstance(product, Sum)
        assert list(product.terms.values()) == [term]
        assert product.terms["feature"] is term
        assert {id(p) for p in term.parameters()} <= {id(p) for p in product.parameters()}


def test_a_sum_of_sums_is_flat_and_adds_values_and_gradients():
    batch = Batch()
    a, b = 0.3 * made("ce") + made("kd"), 2.0 * made("last") + 0.5 * made("task")
    both = a + b
    assert list(both.terms) == ["ce", "kd", "last", "task"]
    assert all(both.terms[name] is (a if name in a.terms else b).terms[name] for name in both.terms)
    means = {name: by_hand(name, batch).mean() for name in both.terms}
    expected = 0.3 * means["ce"] + means["kd"] + 2 * means["last"] + 0.5 * means["task"]
    close(both(*batch.args()), expected, batch)
    close(a(*batch.args()) + b(*batch.args()), expected, batch)
    assert list((a + b + made("own")).terms) == list((a + (b + made("own"))).terms)
    assert [*a.terms] == ["ce", "kd"], "what was added is as it was"


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_terms_does_not_matter(seed):
    batch, names = Batch(), list(TERMS)
    random.Random(seed).shuffle(names)
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(TERMS)}
    expected = sum(w * by_hand(name, batch, batch.mask).mean() for name, w in weights.items())
    criterion = sum(weights[name] * made(name) for name in names)
    close(criterion(*batch.args(), mask=batch.mask), expected, batch)
    assert [c for c in criterion.components if "/" not in c] == names


@pytest.mark.parametrize("weight", [0.25, 3, 0.0, linear(0.0, 1.0, steps=4), lambda step: step / 4])
def test_a_weight_distributes_over_a_sum(weight):
    batch = Batch()
    together = weight * (0.5 * made("ce") + made("kd") + 2 * made("last"))
    separate = weight * (0.5 * made("ce")) + weight * made("kd") + 2 * (weight * made("last"))
    for step in range(3):
        w = weight(step) if callable(weight) else weight
        expected = w * sum(x * by_hand(name, batch).mean() for name, x in (("ce", 0.5), ("kd", 1), ("last", 2)))
        for criterion in (together, separate):
            close(criterion(*batch.args()), expected, batch)
            criterion.advance()


def test_invalid_sums_are_refused_with_the_code_to_write():
    term = Logits()
    with pytest.raises(ValueError, match="'kd' is in the sum twice; give it once, with the sum of its weights"):
        0.5 * term + 0.5 * term
    with pytest.raises(ValueError, match=r"two terms are called 'kd'.*Logits\(\.\.\., name='another'\)"):
        Logits() + Logits(temperature=2.0)
    with pytest.raises(ValueError, match=r"'causal': True.*'reduction': 'sum'.*kdloss\.Sum\(\*terms, \.\.\.\)"):
        Sum(CrossEntropy(), causal=True) + Sum(Logits(), reduction="sum")
    with pytest.raises(TypeError, match=r"Linear.*kdloss\.Task\(function\).*kdloss\.terms\.Term"):
        Sum(CrossEntropy(), nn.Linear(2, 2))
    for name in ("a.b", "", 3, "keys", "type", "training"):
        with pytest.raises(ValueError, match="a term's name is a word"):
            Logits(name=name)
    for other in (nn.Linear(2, 2), 1, "kd", None):
        with pytest.raises(TypeError):
            CrossEntropy() + other
    for weight in ("2", None, True, 1j):
        with pytest.raises(TypeError):
            weight * CrossEntropy()
    for product in (lambda: CrossEntropy() * Logits(), lambda: VanillaKD() * Task(), lambda: Logits() * VanillaKD()):
        with pytest.raises(TypeError, match=r"a weight is a number, .*terms are added, a \+ b"):
            product()
    for weight in (-0.5, float("nan"), float("inf"), torch.ones(2), torch.tensor(1)):
        with pytest.raises(ValueError, match="a weight"):
            CrossEntropy() * weight
    with pytest.raises(ValueError, match="a weight at step 0"):
        ((lambda step: -1.0) * CrossEntropy()).plan(1)


@pytest.mark.parametrize(
    "contract", [{"causal": True}, {"ignore_index": -1}, {"reduction": "sum"}, {"check_finite": True}]
)
def test_settings_of_one_added_sum_hold_for_both(contract):
    explicit, default = Sum(made("ce"), **contract), made("kd")
    sums = (
        explicit + default,
        default + explicit,
        0.5 * explicit + Sum(default),
        Sum(explicit, default),
        Sum(0.5 * explicit, Sum(default, **contract)),
    )
    for criterion in (*sums, Sum(Sum(made("ce")), default, **contract)):
        (name, value), *more = criterion.contract.said().items()
        assert ({name: value}, more) == (contract, [])
    batch = Batch()
    batch.labels[1, 2] = -1 if "ignore_index" in contract else -100
    batch.labels[0, 0] = 3
    same = Batch("causal" in contract)
    same.labels = batch.labels.where(batch.labels != -1, -100)
    values = [by_hand(name, same) for name in ("ce", "kd")]
    expected = sum(v.sum() if "reduction" in contract else v.mean() for v in values)
    torch.testing.assert_close(sums[0](*batch.args()), expected, rtol=1e-12, atol=0)


# -- recipes are sums --


def mean(values, keep):
    """The mean of the kept values; 0 if there are none."""
    return values[keep].sum() / max(int(keep.sum()), 1)


SETTINGS = {
    "alpha": st.floats(0, 1),
    "temperature": st.floats(0.2, 20),
    "logit_weight": st.floats(0, 3),
    "kept": st.lists(st.booleans(), min_size=12, max_size=12),
    "causal": st.booleans(),
}


@settings(max_examples=40, deadline=None)
@given(**SETTINGS)
def test_recipes_equal_the_sums_that_they_abbreviate(alpha, temperature, logit_weight, kept, causal):
    batch, mask = Batch(), torch.tensor(kept).view(3, 4)
    second = Batch(seed=1).teacher
    ce, kd, last = CrossEntropy, lambda **o: Logits(temperature=temperature, **o), lambda: Features("last")
    common = {"alpha": alpha, "temperature": temperature, "causal": causal}
    shared = {"probabilities": lambda z: (z / temperature).softmax(-1), "logits": lambda z: z}
    s, y, keep = batch.logits, batch.labels, mask
    t, u, h, k = batch.teacher.logits, second.logits, batch.hidden[2], batch.teacher.hidden_states[3]
    if causal:
        s, t, u, h, k = (x[:, :-1] for x in (s, t, u, h, k))
        y, keep = y[:, 1:], keep[:, 1:]
    keep = keep & (y != -100)
    own = mean(-s.log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0], keep)
    hard, soft, gap = alpha * own, mean(kl(s, t, temperature), keep), mean((h - k).square().mean(-1), keep)
    cases = [
        (VanillaKD(**common), alpha * ce() + (1 - alpha) * kd(), batch.teacher, hard + (1 - alpha) * soft),
        (
            FeatureKD("last", logit_weight=logit_weight, **common),
            alpha * ce() + (1 - alpha) * (last() + logit_weight * kd()),
            batch.teacher,
            hard + (1 - alpha) * (gap + logit_weight * soft),
        ),
    ]
    for average, take in shared.items():
        both = 0.25 * take(t) + 0.75 * take(u)
        both = temperature * both.log() if average == "probabilities" else both
        cases.append(
            (
                MultiTeacherKD([0.25, 0.75], average=average, **common),
                alpha * ce() + (1 - alpha) * kd(teacher="all", weights=[0.25, 0.75], average=average),
                [batch.teacher, second],
                hard + (1 - alpha) * mean(kl(s, both, temperature), keep),
            )
        )
    for recipe, written, teacher, expected in cases:
        value = recipe(batch.student, teacher, batch.labels, mask=mask)
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(grad(value, batch.inputs), grad(expected, batch.inputs), rtol=1e-8, atol=1e-10)
        twin = Sum(written, causal=causal)(batch.student, teacher, batch.labels, mask=mask)
        close(twin, value, batch)


@pytest.mark.parametrize("recipe", [VanillaKD, FeatureKD, MultiTeacherKD])
def test_a_recipe_is_a_sum(recipe):
    criterion = recipe()
    assert isinstance(criterion, Sum)
    assert isinstance(criterion, nn.Module)
    assert type(criterion + Task(lambda output, labels: 0)) is Sum
    assert list(criterion.terms) == {FeatureKD: ["ce", "feature", "kd"]}.get(recipe, ["ce", "kd"])


@pytest.mark.parametrize("recipe", [VanillaKD, FeatureKD, MultiTeacherKD])
def test_assigned_settings_work_and_are_checked_like_arguments(recipe):
    batch = Batch()
    teacher = [batch.teacher] if recipe is MultiTeacherKD else batch.teacher
    base = {"layers": "last"} if recipe is FeatureKD else {}
    settings = {"alpha": 0.9, "temperature": 3.0} | ({"logit_weight": 1.5} if recipe is FeatureKD else {})
    settings |= {"alpha": linear(0.0, 1.0, steps=2), "temperature": linear(4.0, 1.0, steps=3)}
    for chosen in (settings, {name: settings[name] for name in reversed(settings)}):
        assigned, constructed = recipe(**base), recipe(**base, **chosen)
        for name, value in chosen.items():
            setattr(assigned, name, value)
            assert getattr(assigned, name) == value == getattr(constructed, name)
        for _ in range(3):
            values = [c(batch.student, teacher, batch.labels) for c in (assigned, constructed)]
            close(*values, batch)
            assigned.advance()
            constructed.advance()
    wrong = {"alpha": (1.5, -0.1, float("nan"), "1"), "temperature": (0.0, -1.0, float("inf"), "2", True)}
    wrong |= {"logit_weight": (-1.0, float("nan"), "1")} if recipe is FeatureKD else {}
    for name, values in wrong.items():
        for value in values:
            criterion, errors = recipe(**base), []
            before = getattr(criterion, name)
            for attempt in (lambda v: recipe(**base, **v), lambda v, c=criterion: setattr(c, *next(iter(v.items())))):
                with pytest.raises((ValueError, TypeError), match=name) as raised:
                    attempt({name: value})
                errors.append((raised.type, str(raised.value)))
            assert errors[0] == errors[1]
            assert getattr(criterion, name) == before, "what was refused changed nothing"


# -- weights --


def test_a_weight_of_zero_calls_no_distance_and_gives_its_parameters_zero_gradients():
    def never(student, teacher):
        raise AssertionError("asked")

    batch = Batch()
    for zero in (0.0, linear(0.0, 1.0, steps=5), lambda step: 0.0, 0.0 * 3.0):
        off = Features("last", distance=never, widths=(5, 5), depths=(2, 3), projection=kdloss.projections.linear)
        criterion = made("ce") + zero * off
        value = criterion(batch.student, None, batch.labels)
        close(value, by_hand("ce", batch).mean(), batch)
        assert list(criterion.components) == ["ce"]
        value.backward()
        for p in off.parameters():
            assert p.grad is not None
            assert not p.grad.any()
    alone = 0.0 * Features("last", distance=never)
    value = alone(*batch.args())
    assert value == 0
    assert not any(g.any() for g in grad(value, batch.inputs))


@pytest.mark.parametrize("name", ["ce", "kd", "last", "task"])
def test_a_parameter_as_weight_has_the_mean_of_its_term_as_gradient_and_is_saved(name):
    batch, weight = Batch(), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    criterion = 2.0 * (weight * made(name)) + made("own")
    assert [p is weight for p in criterion.parameters()] == [True]
    mean = by_hand(name, batch, batch.mask).mean()
    value = criterion(*batch.args(), mask=batch.mask)
    close(value, 2 * 0.7 * mean + by_hand("own", batch, batch.mask).mean(), batch)
    torch.testing.assert_close(grad(value, [weight])[0], 2 * mean.detach(), rtol=1e-12, atol=0)
    state = criterion.state_dict()
    assert list(state) == [f"weights.{name}.learned.0"]
    other = 2.0 * (nn.Parameter(torch.tensor(0.1, dtype=torch.float64)) * made(name)) + made("own")
    other.load_state_dict(state)
    assert torch.equal(other(*batch.args(), mask=batch.mask), value)


def test_one_parameter_as_weight_of_a_sum_gets_gradients_from_all_its_terms():
    batch, weight = Batch(), nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    criterion = linear(0.0, 1.0, steps=4) * (weight * (made("ce") + 3.0 * made("last")))
    assert [p is weight for p in criterion.parameters()] == [True]
    criterion.advance()
    slope = grad(criterion(*batch.args()), [weight])[0]
    expected = (by_hand("ce", batch).mean() + 3 * by_hand("last", batch).mean()) / 4
    torch.testing.assert_close(slope, expected.detach().view(1), rtol=1e-12, atol=0)
    twin = copy.deepcopy(criterion)
    assert len(list(twin.parameters())) == 1
    assert next(twin.parameters()) is not weight


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_learned_weight_of_0_takes_nothing_from_a_loss_that_is_no_number_and_learns_from_the_others(
    lazy, bad, reduction
):
    z, t = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    z[0, 0] = bad
    student, weight = z.requires_grad_(), nn.Parameter(torch.zeros(()))
    given = LazyLogits(student, torch.eye(5, dtype=torch.float64)) if lazy else student
    loss = Sum(weight * Logits(), reduction=reduction)(given, t)
    slopes = torch.autograd.grad(loss.sum(), [weight, student])
    assert not loss.any()
    assert not slopes[1].any()
    kept = F.kl_div(z[1:].log_softmax(-1), t[1:].softmax(-1), reduction="sum").item()
    assert slopes[0].item() == pytest.approx(kept / 3 if reduction == "mean" else kept, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
@pytest.mark.parametrize("beside", [0, 1])
def test_a_learned_weight_of_0_does_the_same_for_a_term_that_is_not_on_logits_alone(beside, bad, reduction):
    z = torch.randn(3, 5, dtype=torch.float64)
    z[0, 0] = bad
    student, weight = z.requires_grad_(), nn.Parameter(torch.zeros(()))
    least = Task(lambda output, labels: -output.log_softmax(-1)[:, 0], name="least")
    other = beside * Task(lambda output, labels: output[:, 1], name="other")
    criterion = Sum(weight * least, other, reduction=reduction)
    loss = criterion(student, None, torch.zeros(3, dtype=torch.int64))
    slopes = torch.autograd.grad(loss.sum(), [weight, student], allow_unused=True)
    each = 1 / 3 if reduction == "mean" else 1.0
    torch.testing.assert_close(loss.sum().item(), beside * z[:, 1].sum().item() * each)
    expected = torch.zeros(3, 5, dtype=torch.float64).index_fill_(1, torch.tensor([1]), beside * each)
    torch.testing.assert_close(torch.zeros_like(z) if slopes[1] is None else slopes[1], expected)
    assert slopes[0].item() == pytest.approx(-z[1:].log_softmax(-1)[:, 0].sum().item() * each, rel=1e-5)
    assert not criterion.components["least"].isfinite()


@pytest.mark.parametrize("schedule", [warmup(10, 1.0), lambda step: min(step, 10) / 10])
def test_schedules_multiply_terms(schedule):
    batch = Batch()
    for product in (schedule * made("kd"), made("kd") * schedule, schedule * (1.0 * made("kd"))):
        criterion = product + made("ce")
        assert criterion.scheduled
        for step in range(4):
            expected = 0.1 * step * by_hand("kd", batch).mean() + by_hand("ce", batch).mean()
            close(criterion(*batch.args()), expected, batch)
            criterion.advance()
    squared = schedule * (schedule * made("kd"))
    squared.step = 5
    close(squared(*batch.args()), 0.25 * by_hand("kd", batch).mean(), batch)
    assert squared.state_dict() == {"step": torch.tensor(5)}


# -- reduction --


@every_term
@either_way
@pytest.mark.parametrize("items", [torch.tensor(0), torch.tensor(0.0), torch.tensor(0, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("positions", ["labels", "mask"])
def test_a_batch_without_labels_and_with_zero_items_gives_zero_loss_and_zero_gradients(name, causal, items, positions):
    if positions == "mask" and name in ("ce", "smooth"):
        pytest.skip("cross-entropy with class labels takes its positions from the labels")
    for others in (0.0, 0.5):  # weights of a term on logits and of one that compares positions
        batch = Batch(causal)
        batch.labels = torch.full_like(batch.labels, -100)
        terms = [made(name, positions=positions) if positions == "mask" else made(name)]
        terms += [
            others * Logits(divergences.forward_kl, name="beside"),
            others * Logits(divergences.dist, name="rows"),
        ]
        criterion = Sum(*terms, causal=causal)
        value = criterion(*batch.args(), num_items_in_batch=items)
        assert value.item() == 0
        assert all(not g.any() for g in grad(value, batch.inputs))


def test_a_scalar_term_is_zero_if_the_batch_has_no_items():
    batch = Batch()
    batch.labels = torch.full_like(batch.labels, -100)
    functions = (
        lambda output, labels: output.logits[labels >= 0].mean(),  # NaN
        lambda output, labels: F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()),
        lambda output, labels: output.logits.square().mean(),
    )
    for function in functions:
        for criterion in (Task(function) + Logits(), Sum(Task(function), reduction="mean")):
            value = criterion(*batch.args(), num_items_in_batch=torch.tensor(0))
            assert value.item() == 0
            assert all(not g.any() for g in grad(value, batch.inputs))


@pytest.mark.parametrize("items", [1, 17, torch.tensor(40)])
@either_way
def test_num_items_in_batch_divides_every_term(items, causal):
    batch = Batch(causal)
    expected = sum(by_hand(name, batch, batch.mask).sum() for name in TERMS) / items
    criterion = Sum(*map(made, TERMS), causal=causal)
    close(criterion(*batch.args(), mask=batch.mask, num_items_in_batch=items), expected, batch)


@either_way
def test_reductions_of_a_sum_are_the_sum_of_reductions(causal):
    batch = Batch(causal)
    criterion = [Sum(*map(made, TERMS), causal=causal, reduction=r) for r in ("sum", "none")]
    values = [by_hand(name, batch, batch.mask) for name in TERMS]
    total, each = (c(*batch.args(), mask=batch.mask) for c in criterion)
    close(total, sum(v.sum() for v in values), batch)
    assert each.shape == (3, 3 if causal else 4)
    close(each.sum(), sum(v.sum() for v in values), batch)
    keep = (batch.mask & (batch.labels != -100))[:, 1:] if causal else batch.mask & (batch.labels != -100)
    torch.testing.assert_close(each[keep], sum(values), rtol=1e-12, atol=0)
    assert not each[~keep].any()
    for c in criterion:
        with pytest.raises(ValueError, match="num_items_in_batch"):
            c(*batch.args(), num_items_in_batch=4)


@pytest.mark.parametrize(
    ("contract", "more"),
    [({}, {}), ({}, {"num_items_in_batch": 40}), ({"reduction": "sum"}, {}), ({"reduction": "none"}, {})],
)
@either_way
def test_components_are_unweighted_means_of_the_call_whatever_the_loss_is_divided_by(contract, more, causal):
    batch = Batch(causal)
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(TERMS)}
    criterion = Sum(*(w * made(name) for name, w in weights.items()), causal=causal, **contract)
    criterion(*batch.args(), mask=batch.mask, **more)
    for name in TERMS:
        found, expected = criterion.components[name], by_hand(name, batch, batch.mask).mean()
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.components["last/1-2"], criterion.components["last"])


def mean_of_labelled(output, labels):
    """A scalar loss: the mean over labelled positions."""
    return output.logits.square().mean(-1)[labels != -100].mean()


def test_scalar_terms_of_micro_batches_add_up_to_one_batch():
    batch = Batch()
    values = by_hand("task", batch)
    for criterion in (1.0 * Task(mean_of_labelled), made("ce") + Task(mean_of_labelled)):
        beside = by_hand("ce", batch) if "ce" in criterion.terms else 0 * values
        full = criterion(*batch.args())
        close(full, values.mean() + beside.mean(), batch)
        accumulated = 0
        for i in range(3):
            example = type(batch.student)(logits=batch.logits[i : i + 1])
            accumulated = accumulated + criterion(example, None, batch.labels[i : i + 1], num_items_in_batch=11)
        close(accumulated, full, batch)
        summed = Sum(criterion, reduction="sum")
        close(summed(*batch.args()), values.sum() + beside.sum(), batch)
        torch.testing.assert_close(summed.components["task"], values.mean().detach())
        with pytest.raises(ValueError, match=r"'task' is one number.*reduction='none'.*reduction='mean' or 'sum'"):
            Sum(criterion, reduction="none")(*batch.args())
    with pytest.raises(ValueError, match=r"'task' gives values of shape \(3,\).*\(3, 4\)"):
        (1.0 * Task(lambda output, labels: output.logits.mean((1, 2))))(*batch.args())


def test_the_same_teacher_twice_at_half_the_weight_equals_it_once():
    batch = Batch()
    one = 1.0 * made("kd")
    two = 0.5 * Logits(temperature=2.0, name="first") + 0.5 * Logits(temperature=2.0, teacher=1, name="second")
    value = one(*batch.args(), mask=batch.mask)
    both = two(batch.student, [batch.teacher, batch.teacher], batch.labels, mask=batch.mask)
    assert torch.equal(both, value)
    torch.testing.assert_close(grad(both, batch.inputs), grad(value, batch.inputs), rtol=1e-15, atol=1e-17)
    for average in ("logits", "probabilities"):
        together = 1.0 * Logits(temperature=2.0, teacher=[0, 1], average=average)
        close(together(batch.student, [batch.teacher, batch.teacher], batch.labels, mask=batch.mask), value, batch)


def test_weights_of_teachers_follow_the_order_of_the_teacher_argument():
    batch, second = Batch(), Batch(seed=1).teacher
    other = torch.where(batch.mask & (batch.labels != -100), 1.0, 0.0)
    t = 0.25 * second.logits + 0.75 * batch.teacher.logits
    expected = (kl(batch.logits, t, 2.0) * other).sum() / other.sum()
    criterion = 1.0 * Logits(temperature=2.0, teacher=(1, 0), weights=[0.25, 0.75], average="logits")
    close(criterion(batch.student, [batch.teacher, second], batch.labels, mask=batch.mask), expected, batch)


# -- masked positions, empty batches, copies --


@either_way
def test_garbage_under_the_mask_reaches_no_term(causal):
    more = Logits(divergences.dkd, name="dkd"), Logits(divergences.dist, name="dist")
    more += (Features("all", name="all"), Confidence(name="confidence", positions="mask"))
    more += (Logits(divergences.hard_labels, name="hard"), Logits(divergences.uld, name="uld"))
    terms = [made(name, positions=p) for name in TERMS if name != "task" for p in ["labels"]]
    criterion = Sum(*terms, *more, causal=causal)
    clean, dirty = Batch(causal), Batch(causal)
    clean.labels[0, 0] = 3  # a NaN at an unlabelled position would be counted by terms with positions="mask"
    value = criterion(*clean.args(), mask=clean.mask)
    slopes, parts = grad(value, clean.inputs), dict(criterion.components)
    dirty.labels[0, 0] = 3
    out = ~dirty.mask
    if causal:  # the mask is aligned with the labels: logits at t predict label t + 1
        out = torch.cat([out[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)
    for own in (dirty.logits, *dirty.hidden[1:]):
        own.data[out] = float("nan")
    for theirs in (dirty.teacher.logits, *dirty.teacher.hidden_states[1:]):
        theirs[out] = float("inf")
    dirty.labels[~dirty.mask] = 10**9
    value_of_dirty = criterion(*dirty.args(), mask=dirty.mask)
    assert torch.equal(value_of_dirty, value)
    for slope, expected in zip(grad(value_of_dirty, dirty.inputs), slopes, strict=True):
        assert torch.equal(slope, expected)
        assert not slope[out].any()
        assert slope[~out].any()
    for name, part in criterion.components.items():
        assert torch.equal(part, parts[name]), name


@either_way
def test_without_counted_positions_loss_gradients_and_components_are_zero(causal):
    batch, criterion = Batch(causal), Sum(*map(made, TERMS), causal=causal)
    batch.labels[:] = -100
    value = criterion(*batch.args())
    assert value == 0
    assert not any(g.any() for g in grad(value, batch.inputs))
    assert all(part == 0 for part in criterion.components.values())


@pytest.mark.parametrize(("contract", "more"), [({}, {}), ({}, {"num_items_in_batch": 4}), ({"reduction": "sum"}, {})])
def test_a_task_without_labels_adds_zero_to_the_other_terms(contract, more):
    """The mean of cross-entropy is NaN without labels; a micro-batch without labels must not make the loss NaN."""
    batch = Batch()
    batch.labels[:] = -100
    own = Task(lambda output, labels: F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    criterion = Sum(made("kd", positions="mask"), own, **contract)
    expected = by_hand("kd", batch, by_mask=True).sum() / (1 if contract else more.get("num_items_in_batch", 12))
    close(criterion(*batch.args(), **more), expected, batch)
    assert criterion.components["task"] == 0


def test_sums_survive_deepcopy_pickle_and_state_dict():
    batch = Batch()
    criterion = linear(0.5, 1.0, steps=4) * made("kd") + nn.Parameter(torch.tensor(0.3)) * made("ce")
    criterion += 2.0 * Features("last", depths=(2, 3), widths=(5, 5), projection=kdloss.projections.linear)
    criterion = Sum(criterion + Confidence(name="own"), check_finite=True).double()
    criterion.advance()
    value = criterion(*batch.args())
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(*batch.args()), value)
        assert (repr(twin), twin.step, twin.contract) == (repr(criterion), 1, criterion.contract)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in criterion.parameters()}
        twin.advance()
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        assert torch.equal(criterion(*batch.args()), value), "copies share nothing"
        assert not torch.isclose(twin(*batch.args()), value)
        twin.load_state_dict(criterion.state_dict())
        assert twin.step == 1
        assert torch.equal(twin(*batch.args()), value)
    assert sorted(criterion.state_dict()) == [
        "step",
        "terms.feature.projections.1.bias",
        "terms.feature.projections.1.weight",
        "weights.ce.learned.0",
    ]


def test_a_term_can_be_called_like_a_sum_of_one_term():
    student, teacher = torch.randn(2, 5, 7)
    value = Logits(temperature=2.0)(student, teacher)
    torch.testing.assert_close(value, kl(student, teacher, 2.0).mean())
    model = kdloss.Distillation(nn.Linear(4, 3), nn.Linear(4, 3), CrossEntropy())
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(model(x, labels=y).loss, F.cross_entropy(model.student(x), y))


def test_arguments_in_the_wrong_order_are_refused_with_the_right_order():
    net = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"Distillation\(student, teacher, criterion\)"):
        kdloss.Distillation(net, kdloss.VanillaKD(), net)
    with pytest.raises(TypeError, match=r"kdloss\.Task\(function\)"):
        kdloss.Distillation(net, net, lambda output, labels: output.sum())


def test_a_task_reads_the_part_of_the_output_that_take_names():
    aux, labels = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    output = {"logits": torch.randn(5, 3), "heads": {"aux": aux}, "mlm_loss": aux.square().mean()}
    of_part = 1.0 * Task(lambda part, labels: F.cross_entropy(part, labels, reduction="none"), take=("heads", "aux"))
    torch.testing.assert_close(of_part(output, None, labels), F.cross_entropy(aux, labels))
    torch.testing.assert_close((1.0 * Task(take="mlm_loss"))(output, None, labels), aux.square().mean())
    with pytest.raises(TypeError, match="take='axu' finds nothing"):
        (1.0 * Task(lambda part, labels: part.sum(), take="axu"))(output, None, labels)
    with pytest.raises(TypeError, match=r"there is none in a dict of \{'logits'"):
        (1.0 * Task())(output, None, labels)


def test_a_divergence_that_reads_labels_is_refused_with_positions_mask():
    criterion = 1.0 * Logits(divergences.dkd, positions="mask")
    with pytest.raises(ValueError, match=r"divergence of the term 'kd' reads labels.*positions='labels'"):
        criterion(*torch.randn(2, 4, 5), torch.tensor([0, 1, -100, 2]))


def test_numpy_numbers_are_accepted_as_weights():
    term = CrossEntropy()
    for product in (term * np.float32(0.5), np.float64(0.5) * term):
        assert product.weights["ce"].at(0) == 0.5


@pytest.mark.parametrize("side", ["take", "teacher_take"])
def test_take_with_hidden_states_is_refused(side):
    states = SimpleNamespace(hidden_states=[torch.randn(2, 3, 4) for _ in range(3)])
    with pytest.raises(TypeError, match="hidden_states aren't outputs of modules"):
        (1.0 * Features("last", **{side: 0}))(states, states)
