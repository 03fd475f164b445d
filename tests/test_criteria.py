"""VanillaKD, FeatureKD and MultiTeacherKD, compared with their formulas in numpy."""

import copy
import pickle
import re
from functools import partial
from types import SimpleNamespace as Output

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from losses import sample
from torch import nn
from versions import since_torch

import kdloss
from kdloss import Captured

MASK = torch.tensor([[True, True, False, True], [True, False, True, True], [True, True, True, False]])


def batch(dtype=torch.float64, positions=(3, 4), classes=7):
    """Return student and teacher logits, labels of which one is ignored, and a mask."""
    student, teacher = sample(*positions, classes, dtype=dtype)
    labels = torch.randint(0, classes, positions)
    labels[0, 0] = -100
    return student, teacher, labels, MASK


def by_hand(student, teacher, labels, keep, *, alpha, temperature, divergence=oracles.forward_kl):
    """Compute the loss in numpy, averaged over the positions in `keep`."""
    s, t = student.detach().double().numpy()[keep], teacher.double().numpy()[keep]
    ce = oracles.cross_entropy(s, labels.numpy()[keep]).mean()
    return alpha * ce + (1 - alpha) * divergence(s, t, temperature).mean()


def grad(value, *inputs):
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_vanilla_is_alpha_ce_plus_one_minus_alpha_kl_times_t_squared(alpha, temperature):
    student, teacher, labels, mask = batch()
    criterion = kdloss.VanillaKD(temperature, alpha)
    loss = criterion(student, teacher, labels, mask=mask)
    keep = (mask & (labels != -100)).numpy()
    hand = by_hand(student, teacher, labels, keep, alpha=alpha, temperature=temperature)
    assert loss.item() == pytest.approx(hand, rel=1e-12)

    def loss_of(s):
        ce = oracles.cross_entropy(s[keep], labels.numpy()[keep]).sum()
        kl = oracles.forward_kl(s[keep], teacher.numpy()[keep], temperature).sum()
        return (alpha * ce + (1 - alpha) * kl) / keep.sum()

    exact = oracles.gradient(lambda s: np.asarray(loss_of(s)), student.detach().numpy())
    np.testing.assert_allclose(grad(loss, student)[0], exact, rtol=1e-9, atol=1e-12)


def test_defaults_are_those_of_the_guide():
    vanilla, feature = kdloss.VanillaKD(), kdloss.FeatureKD()
    assert (vanilla.temperature, vanilla.alpha) == (2.0, 0.5)
    assert (feature.temperature, feature.alpha, feature.logit_weight) == (2.0, 0.3, 0.0)
    assert feature.terms["feature"].layer_map.layers == "auto"
    assert feature.terms["feature"].distance is kdloss.distances.mse


def test_t_squared_multiplies_value_and_gradient_and_can_be_turned_off():
    student, teacher, _, _ = batch()
    scaled = kdloss.VanillaKD(3.0, 0.0)(student, teacher)
    plain = partial(kdloss.divergences.forward_kl, t_squared=False)
    unscaled = kdloss.VanillaKD(3.0, 0.0, divergence=plain)(student, teacher)
    torch.testing.assert_close(scaled, 9 * unscaled)
    torch.testing.assert_close(grad(scaled, student)[0], 9 * grad(unscaled, student)[0])


def test_the_mean_depends_on_neither_the_number_of_classes_nor_of_positions():
    student, teacher, _, _ = batch()
    loss = kdloss.VanillaKD(1.0, 0.0)(student, teacher)
    twice_the_classes = kdloss.VanillaKD(1.0, 0.0)(
        *(torch.cat([x, torch.full_like(x, -torch.inf)], -1) for x in (student, teacher))
    )
    longer = kdloss.VanillaKD(1.0, 0.0)(student.repeat(1, 5, 1), teacher.repeat(1, 5, 1))
    torch.testing.assert_close(twice_the_classes, loss)
    torch.testing.assert_close(longer, loss)


def test_alpha_one_needs_no_teacher_and_alpha_zero_needs_no_labels():
    student, teacher, labels, _ = batch()
    assert kdloss.VanillaKD(alpha=1.0)(student, None, labels).isfinite()
    assert kdloss.VanillaKD(alpha=0.0)(student, teacher).isfinite()
    broken = torch.full_like(teacher, float("nan"))
    assert kdloss.VanillaKD(alpha=1.0)(student, broken, labels).isfinite()
    with pytest.raises(ValueError, match="labels"):
        kdloss.VanillaKD(alpha=0.5)(student, teacher)


@pytest.mark.parametrize("make", [kdloss.VanillaKD, kdloss.MultiTeacherKD], ids=lambda c: c.__name__)
def test_values_at_ignored_positions_change_neither_loss_nor_gradient(make):
    student, teacher, labels, mask = batch()
    criterion = make()
    wrap = (lambda t: [t]) if make is kdloss.MultiTeacherKD else (lambda t: t)
    clean = criterion(student, wrap(teacher), labels, mask=mask)
    clean_grad = grad(clean, student)[0]
    ignored = ~(mask & (labels != -100))
    dirty, dirty_teacher, dirty_labels = student.detach().clone(), teacher.clone(), labels.clone()
    dirty[ignored], dirty_teacher[ignored] = float("nan"), float("inf")
    dirty_labels[~mask] = 10**9
    dirty.requires_grad_()
    value = criterion(dirty, wrap(dirty_teacher), dirty_labels, mask=mask)
    slope = grad(value, dirty)[0]
    assert torch.equal(value, clean)
    assert torch.equal(slope, clean_grad)
    assert not slope[ignored].any()


def test_labels_that_are_all_ignored_give_zero_loss_and_zero_gradients():
    student, teacher, labels, _ = batch()
    loss = kdloss.VanillaKD()(student, teacher, torch.full_like(labels, -100))
    assert loss == 0
    assert not grad(loss, student)[0].any()


def test_causal_compares_logits_with_the_next_label_in_every_term():
    student, teacher, labels, mask = batch()
    criterion = kdloss.VanillaKD(2.0, 0.4, causal=True)
    loss = criterion(student, teacher, labels, mask=mask)
    keep = (mask & (labels != -100))[:, 1:].numpy()
    hand = by_hand(student[:, :-1], teacher[:, :-1], labels[:, 1:], keep, alpha=0.4, temperature=2.0)
    assert loss.item() == pytest.approx(hand, rel=1e-12)
    with pytest.raises(ValueError, match="causal=False"):
        criterion(student[:, 0], teacher[:, 0], labels[:, 0])


@pytest.mark.parametrize("causal", [False, True])
def test_unequal_micro_batches_add_up_to_the_gradient_of_one_batch(causal):
    student, teacher, labels, _ = batch()
    labels[1, 1:3] = -100
    h_student, h_teacher = sample(3, 4, 5, dtype=torch.float64, seed=1)
    criterion = kdloss.FeatureKD(layers="last", logit_weight=0.5, depths=(1, 1), causal=causal)
    counted = (labels[:, 1:] if causal else labels) != -100

    def loss(examples, **settings):
        s = Output(logits=student[examples], hidden_states=[h_student[examples], h_student[examples]])
        t = Output(logits=teacher[examples], hidden_states=[h_teacher[examples], h_teacher[examples]])
        return criterion(s, t, labels[examples], **settings)

    full = loss(slice(None))
    micro_losses = [loss(slice(i, i + 1), num_items_in_batch=counted.sum()) for i in range(3)]
    torch.testing.assert_close(sum(micro_losses), full, rtol=1e-12, atol=0)
    one, many = grad(full, student, h_student), grad(sum(micro_losses), student, h_student)
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-14)
    means = sum(loss(slice(i, i + 1)) for i in range(3)) / 3
    assert not torch.isclose(means, full), "the mean of the micro-batch means differs here"


def test_components_are_the_detached_terms_of_the_loss():
    student, teacher, labels, mask = batch()
    criterion = kdloss.VanillaKD(alpha=0.25)
    loss = criterion(student, teacher, labels, mask=mask)
    ce, kd = criterion.components["ce"], criterion.components["kd"]
    assert not ce.requires_grad
    torch.testing.assert_close(0.25 * ce + 0.75 * kd, loss.detach())


def test_reduction_none_gives_one_value_per_position():
    student, teacher, labels, mask = batch()
    for make in (kdloss.VanillaKD, partial(kdloss.FeatureKD, "last", logit_weight=1.0)):
        none, mean, total = (make(reduction=r) for r in ("none", "mean", "sum"))
        s, t = (Output(logits=x, hidden_states=[x, x]) for x in (student, teacher))
        values = none(s, t, labels, mask=mask)
        keep = mask & (labels != -100)
        assert values.shape == (3, 4)
        torch.testing.assert_close(values[keep].mean(), mean(s, t, labels, mask=mask))
        torch.testing.assert_close(values.sum(), total(s, t, labels, mask=mask))


def test_any_function_that_returns_one_value_per_position_can_be_a_divergence():
    def squared(student, teacher, *, temperature):
        return (student - teacher).square().sum(-1) / temperature

    student, teacher, _, mask = batch()
    loss = kdloss.VanillaKD(4.0, 0.0, divergence=squared)(student, teacher, mask=mask)
    torch.testing.assert_close(loss, (student - teacher).square().sum(-1)[mask].mean() / 4)


def test_the_teacher_gets_no_gradient_from_a_function_that_does_not_detach_it():
    def squared(student, teacher, **_):
        return (student - teacher).square().mean(-1)

    student, teacher = feature_outputs()
    teacher.logits.requires_grad_()
    teacher.hidden_states[8].requires_grad_()
    settings = {"divergence": squared, "alpha": 0.0}
    feature = kdloss.FeatureKD("last", distance=squared, logit_weight=1.0, **settings)
    for criterion in (feature, kdloss.VanillaKD(**settings)):
        criterion(student, teacher).backward()
    assert student.logits.grad.any()
    assert teacher.logits.grad is None
    assert teacher.hidden_states[8].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_computed_in_float32(dtype):
    student, teacher, labels, mask = batch(dtype)
    loss = kdloss.VanillaKD()(student, teacher, labels, mask=mask)
    keep = (mask & (labels != -100)).numpy()
    hand = by_hand(student, teacher, labels, keep, alpha=0.5, temperature=2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(hand, rel=1e-5)
    assert grad(loss, student)[0].dtype == dtype


def test_under_autocast_the_loss_is_float32():
    model = nn.Linear(8, 7)
    features = torch.randn(3, 4, 8)
    criterion = kdloss.FeatureKD("last", logit_weight=1.0, depths=(1, 1), widths=(8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        student = Output(logits=model(features), hidden_states=[features, features])
        teacher = Output(logits=torch.randn(3, 4, 7), hidden_states=[torch.randn(3, 4, 16)] * 2)
        loss = criterion(student, teacher, torch.zeros(3, 4, dtype=torch.long))
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.isfinite().all()


# -- features --


def feature_outputs(s_width=5, t_width=5, s_depth=4, t_depth=8):
    student = [sample(3, 4, s_width, seed=i)[0] for i in range(s_depth + 1)]
    teacher = [sample(3, 4, t_width, seed=i)[1] for i in range(t_depth + 1)]
    s_logits, t_logits = sample(3, 4, 7)
    return Output(logits=s_logits, hidden_states=student), Output(logits=t_logits, hidden_states=teacher)


def test_feature_loss_is_the_mean_over_pairs_positions_and_width():
    student, teacher = feature_outputs()
    labels = torch.randint(0, 7, (3, 4))
    labels[0, 0] = -100
    criterion = kdloss.FeatureKD(layers=[0, -1], alpha=0.3, logit_weight=0.5)
    loss = criterion(student, teacher, labels, mask=MASK)
    keep = (MASK & (labels != -100)).numpy()
    squares = [
        (student.hidden_states[s + 1].detach().numpy() - teacher.hidden_states[t + 1].numpy())[keep] ** 2
        for s, t in [(0, 0), (3, 7)]
    ]
    s, t = student.logits.detach().double().numpy()[keep], teacher.logits.double().numpy()[keep]
    ce = oracles.cross_entropy(s, labels.numpy()[keep]).mean()
    feature, kl = np.mean([x.mean() for x in squares]), oracles.forward_kl(s, t, 2.0).mean()
    assert loss.item() == pytest.approx(0.3 * ce + 0.7 * (feature + 0.5 * kl), rel=1e-5)
    components = {name: value.item() for name, value in criterion.components.items()}
    assert components["feature"] == pytest.approx(feature, rel=1e-5)
    assert components["feature/3-7"] == pytest.approx(squares[1].mean(), rel=1e-5)
    assert components["kd"] == pytest.approx(kl, rel=1e-5)
    loss.backward()
    assert student.hidden_states[1].grad[keep].abs().min() > 0
    assert not student.hidden_states[1].grad[~torch.from_numpy(keep)].any()
    assert student.hidden_states[2].grad is None


@pytest.mark.parametrize("named", [False, True])
def test_pairs_have_their_specified_weights_in_value_and_gradient(named):
    student, teacher = feature_outputs()
    s, t = student.hidden_states, teacher.hidden_states
    pairing = [(3, 7, 0.2), (0, 1, 1.5), (0, 4, 0.5), (2, 2, 0.0)]
    if named:
        student, teacher = Captured(), Captured()
        for seen, states in ((student, s), (teacher, t)):
            seen.features.update({f"block.{i}": h for i, h in enumerate(states[1:])})
        pairing = [(f"block.{i}", f"block.{j}", w) for i, j, w in pairing]
    criterion = kdloss.FeatureKD(pairing=pairing, alpha=0.0)
    loss = criterion(student, teacher)

    def distance(i, j):
        gap = s[i + 1].detach().double().numpy() - t[j + 1].double().numpy()
        return (gap**2).mean(), 2 * gap / gap.size

    (last, last_slope), (low, low_slope), (high, high_slope) = (
        distance(3, 7),
        distance(0, 1),
        distance(0, 4),
    )
    expected = 0.2 * last + 1.5 * low + 0.5 * high
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    values = [value.item() for value in criterion.components.values()]
    assert values == pytest.approx([last, low, high, expected], rel=1e-5)
    name = "feature/block.0-block.4" if named else "feature/0-4"
    assert [list(criterion.components)[i] for i in (2, 3)] == [name, "feature"]
    slopes = grad(loss, s[4], s[1])
    np.testing.assert_allclose(slopes[0], 0.2 * last_slope, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(slopes[1], 1.5 * low_slope + 0.5 * high_slope, rtol=1e-5, atol=1e-9)


def captured(*outputs):
    """Return what `kdloss.capture` of all blocks would have recorded for these outputs."""
    seen = [Captured() for _ in outputs]
    for c, output in zip(seen, outputs, strict=True):
        c.output = output
        c.features.update(enumerate(output.hidden_states[1:]))
    return seen


def test_a_learned_pairing_gets_features_and_mean_distances_and_its_weights_are_constants():
    student, teacher = feature_outputs(s_width=5, t_width=6)
    received = {}

    fixed = torch.tensor(2.0, requires_grad=True)

    def pairing(student, teacher, distances):
        received.update(student=student, teacher=teacher, distances=distances)
        assert not torch.is_grad_enabled()
        weight = student[2].square().sum(-1)  # one weight per position
        return [(0, 1, 0.5), (2, 7, fixed), (2, 0, weight)]

    criterion = kdloss.FeatureKD([0, 2], pairing=pairing, alpha=0.0, depths=(4, 8), widths=(5, 6))
    loss = criterion(*captured(student, teacher), mask=MASK)
    s = {i: criterion.projections[str(i)](student.hidden_states[i + 1]) for i in (0, 2)}
    t = dict(enumerate(teacher.hidden_states[1:]))
    gaps = {(i, j): (s[i] - t[j]).square().mean(-1)[MASK] for i in s for j in t}
    assert list(received["student"]) == [0, 2]
    assert list(received["teacher"]) == list(range(8))
    assert list(received["distances"]) == list(gaps)
    for i, h in received["student"].items():
        torch.testing.assert_close(h[MASK], s[i][MASK])
        assert not h.requires_grad
    for pair, d in received["distances"].items():
        torch.testing.assert_close(d, gaps[pair].mean())
        assert not d.requires_grad
    weight = s[2].detach().square().sum(-1)[MASK]
    losses = [0.5 * gaps[0, 1].mean(), 2 * gaps[2, 7].mean() + (weight * gaps[2, 0]).mean()]
    torch.testing.assert_close(loss, sum(losses))
    assert list(criterion.components) == ["feature/0", "feature/2", "feature"]
    torch.testing.assert_close(list(criterion.components.values()), [p.detach() for p in (*losses, sum(losses))])
    assert torch.autograd.grad(loss, fixed, retain_graph=True, allow_unused=True) == (None,)
    inputs = [student.hidden_states[1], student.hidden_states[3], *criterion.parameters()]
    for got, expected in zip(grad(loss, *inputs), grad(sum(losses), *inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "learned", [kdloss.layers.pair_by_emd, kdloss.layers.pair_by_attention], ids=["emd", "attention"]
)
def test_masked_positions_do_not_change_a_learned_pairing(learned):
    outputs = feature_outputs()
    criterion = kdloss.FeatureKD("all", pairing=learned, alpha=0.0, depths=(4, 8))
    clean = criterion(*captured(*outputs), mask=MASK)
    slopes = grad(clean, *outputs[0].hidden_states[1:])
    for h in (*outputs[0].hidden_states, *outputs[1].hidden_states):
        h.data[~MASK] = float("nan")
    dirty = criterion(*captured(*outputs), mask=MASK)
    assert torch.equal(dirty, clean)
    for a, b in zip(grad(dirty, *outputs[0].hidden_states[1:]), slopes, strict=True):
        assert torch.equal(a, b)
        assert not a[~MASK].any()
    assert criterion(*captured(*outputs), mask=torch.zeros_like(MASK)) == 0


def test_pairing_by_attention_has_the_gradient_of_the_distance_to_the_papers_mixture():
    student, teacher = feature_outputs(t_depth=5)
    criterion = kdloss.FeatureKD("all", pairing=kdloss.layers.pair_by_attention, alpha=0.0, depths=(4, 5))
    loss = criterion(*captured(student, teacher))
    s, t = torch.stack(student.hidden_states[1:]), torch.stack(teacher.hidden_states[1:])
    attention = torch.einsum("s...d,t...d->st...", s, t).softmax(1).detach()
    mixture = torch.einsum("st...,t...d->s...d", attention, t)
    paper = (s - mixture).square().mean()
    inputs = student.hidden_states[1:]
    for got, expected in zip(grad(loss, *inputs), grad(paper, *inputs), strict=True):
        torch.testing.assert_close(got, expected)
    spread = torch.einsum("st...,t...d->s...d", attention, t.square()) - mixture.square()
    torch.testing.assert_close(loss, paper + spread.mean())


def test_learned_weights_multiply_distances_before_the_mean_over_other_positions_than_the_labels():
    s, t = sample(2, 6, 5)
    weight = torch.rand(2, 6)
    feature_mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])  # a decoder's labels, at other positions than the features
    logits = torch.randn(2, 3, 7)
    outputs = [Output(logits=logits, hidden_states=[h, h]) for h in (s, t)]
    criterion = kdloss.FeatureKD(
        "last", pairing=lambda student, teacher, distances: [(0, 0, weight)], alpha=0.0, depths=(1, 1)
    )
    loss = criterion(*captured(*outputs), labels, feature_mask=feature_mask)
    squares = weight * (s.detach() - t).square().mean(-1)
    per_example = torch.stack([squares[0].mean(), squares[1, :2].mean()])
    torch.testing.assert_close(loss.detach(), (3 * per_example[0] + per_example[1]) / 4)


@pytest.mark.parametrize(
    ("chosen", "error", "match"),
    [
        ([], TypeError, "triples"),
        ([(0, 1)], TypeError, "triples"),
        ([(0, 9, 1.0)], ValueError, r"chose \[\(0, 9\)\]"),
        ([(0, 1, 0.5), (0, 1, 0.5)], ValueError, "twice"),
        ([(0, 1, torch.ones(4))], ValueError, r"shape \(4,\).*\(3, 4\)"),
    ],
)
def test_a_learned_pairing_that_returns_invalid_pairs_is_refused(chosen, error, match):
    criterion = kdloss.FeatureKD("all", pairing=lambda student, teacher, distances: chosen, alpha=0.0, depths=(4, 8))
    with pytest.raises(error, match=match):
        criterion(*captured(*feature_outputs()))


def test_a_student_layer_has_one_projection_for_all_its_teacher_layers():
    pairing = [(0, 1, 0.5), (0, 4, 0.5)]
    criterion = kdloss.FeatureKD(pairing=pairing, depths=(4, 8), widths=(5, 6), alpha=0.0)
    assert list(criterion.state_dict()) == [f"terms.feature.projections.0.{part}" for part in ("weight", "bias")]
    student, teacher = feature_outputs(s_width=5, t_width=6)
    weight, bias = criterion.parameters()
    projected = student.hidden_states[1] @ weight.T + bias
    parts = [(projected - teacher.hidden_states[j + 1]).square().mean() for j in (1, 4)]
    torch.testing.assert_close(criterion(student, teacher), (parts[0] + parts[1]) / 2)
    with pytest.raises(ValueError, match=r"student layer 0 .* widths 6 and 7 \(4\).*one width"):
        kdloss.FeatureKD(pairing=pairing, depths=(4, 8), widths=[(5, 6), (5, 7)])


def test_projections_receive_no_garbage_from_masked_positions():
    student, teacher = feature_outputs(s_width=5, t_width=6)
    criterion = kdloss.FeatureKD(alpha=0.0, depths=(4, 8), widths=(5, 6))
    clean = criterion(student, teacher, mask=MASK)
    clean_grads = grad(clean, *criterion.parameters())
    for h in (*student.hidden_states, *teacher.hidden_states):
        h.data[~MASK] = float("nan")
    dirty = criterion(student, teacher, mask=MASK)
    assert torch.equal(dirty, clean)
    for a, b in zip(grad(dirty, *criterion.parameters()), clean_grads, strict=True):
        assert torch.equal(a, b)


def test_the_error_for_a_width_mismatch_says_how_to_add_a_projection():
    student, teacher = feature_outputs(s_width=5, t_width=6)
    with pytest.raises(ValueError, match=r"width 5 .* 6.*distill\.prepare\(student, \*\*batch\).*widths=\(5, 6\)"):
        kdloss.FeatureKD(alpha=0.0)(student, teacher)


def test_projections_are_made_at_construction_from_widths_and_are_saved():
    criterion = kdloss.FeatureKD(depths=(4, 8), widths=(5, 6))
    assert len(list(criterion.parameters())) == 8
    other = kdloss.FeatureKD(depths=(4, 8), widths=(5, 6))
    other.load_state_dict(criterion.state_dict())
    student, teacher = feature_outputs(s_width=5, t_width=6)
    labels = torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(criterion(student, teacher, labels), other(student, teacher, labels))
    with pytest.raises(RuntimeError, match=r"feature\.projections\.0\.weight"):
        kdloss.FeatureKD().load_state_dict(criterion.state_dict())
    with pytest.raises(ValueError, match="depths"):
        kdloss.FeatureKD(widths=(5, 6))
    with pytest.raises(ValueError, match="1 widths for 2 pairs"):
        kdloss.FeatureKD([0, 1], depths=(4, 8), widths=[(5, 6)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_projections_accept_features_of_any_precision(dtype):
    student, teacher = feature_outputs(s_width=5, t_width=6)
    criterion = kdloss.FeatureKD(alpha=0.0, depths=(4, 8), widths=(5, 6))
    plain = criterion(student, teacher)
    for output in (student, teacher):
        output.hidden_states = [h.detach().to(dtype) for h in output.hidden_states]
    loss = criterion(student, teacher)
    torch.testing.assert_close(loss, plain, check_dtype=False, rtol=1e-2, atol=0)
    loss.backward()
    assert all(p.grad.any() for p in criterion.parameters())


def test_equal_widths_need_no_parameters():
    assert kdloss.FeatureKD(depths=(4, 8), widths=(5, 5)).state_dict() == {}
    assert kdloss.VanillaKD().state_dict() == {}


def test_features_of_any_shape_are_averaged_within_their_example():
    labels = torch.tensor([1, -100, 2])
    counted = [0, 2]
    for shape in [(3, 5, 2, 4), (3, 9, 5), (3, 5)]:
        s, t = sample(*shape)
        s.data[1] = float("nan")  # the ignored example
        logits = torch.randn(3, 7)
        criterion = kdloss.FeatureKD("last", alpha=0.0)
        student = Output(logits=logits, hidden_states=[s, s])
        teacher = Output(logits=logits, hidden_states=[t, t])
        loss = criterion(student, teacher, labels)
        squares = (s.detach() - t).square().flatten(1).mean(1)
        torch.testing.assert_close(loss.detach(), squares[counted].mean())
        slope = grad(loss, s)[0]
        assert not slope[1].any()
        assert slope[0].any()


def test_features_at_other_positions_than_the_labels_use_feature_mask():
    s, t = sample(2, 6, 5)
    feature_mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])  # a decoder's labels, at other positions than the features
    logits = torch.randn(2, 3, 7)
    criterion = kdloss.FeatureKD("last", alpha=0.0)
    student = Output(logits=logits, hidden_states=[s, s])
    teacher = Output(logits=logits, hidden_states=[t, t])
    loss = criterion(student, teacher, labels, feature_mask=feature_mask)
    squares = (s.detach() - t).square().mean(-1)
    per_example = torch.stack([squares[0].mean(), squares[1, :2].mean()])
    torch.testing.assert_close(loss.detach(), (3 * per_example[0] + per_example[1]) / 4)
    assert not grad(loss, s)[0][1, 2:].any()


def test_feature_kd_without_features_says_how_to_get_them():
    logits = torch.randn(3, 4, 7)
    with pytest.raises(ValueError, match=r"distill\.prepare.*output_hidden_states=True"):
        kdloss.FeatureKD(alpha=0.0)(logits, logits)
    with pytest.raises(TypeError, match="output_hidden_states=True"):
        kdloss.FeatureKD(alpha=0.0, depths=(2, 2))(logits, logits)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": "lately"}, "'auto', 'all', 'key', 'late', 'last'"),
        ({"layers": []}, "empty"),
        ({"pairing": "unifrom"}, "'uniform', 'same'"),
        ({"layers": [0], "pairing": [(0, 1)]}, "leave layers out"),
        ({"logit_weight": -1.0}, "not negative"),
    ],
)
def test_invalid_settings_are_refused_at_construction(settings, match):
    with pytest.raises(ValueError, match=match):
        kdloss.FeatureKD(**settings)


def test_with_hidden_states_a_last_block_pairs_only_with_a_last_block():
    student, teacher = feature_outputs()
    with pytest.raises(ValueError, match="final norm"):
        kdloss.FeatureKD(alpha=0.0, pairing="first")(student, teacher)


# -- several teachers --


def test_a_list_of_one_teacher_gives_exactly_the_single_teacher_loss():
    student, teacher, labels, mask = batch()
    single = kdloss.VanillaKD()(student, teacher, labels, mask=mask)
    for average in ("probabilities", "logits"):
        several = kdloss.MultiTeacherKD(average=average)(student, [teacher], labels, mask=mask)
        assert torch.equal(several, single)
        assert torch.equal(kdloss.Mixture([teacher], average=average).dense(3.0), teacher)


@pytest.mark.parametrize("weights", [None, [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
def test_teachers_are_averaged_by_probabilities_or_by_logits(weights):
    student, first, labels, mask = batch()
    second = sample(3, 4, 7, dtype=torch.float64, seed=5)[1]
    keep = (mask & (labels != -100)).numpy()
    w = weights or [0.5, 0.5]
    a, b = first.numpy() / 2, second.numpy() / 2
    mixed = {
        "probabilities": 2 * np.log(w[0] * np.exp(oracles.log_softmax(a)) + w[1] * np.exp(oracles.log_softmax(b))),
        "logits": w[0] * first.numpy() + w[1] * second.numpy(),
    }
    for average, target in mixed.items():
        criterion = kdloss.MultiTeacherKD(weights, average=average)
        loss = criterion(student, [first, second], labels, mask=mask)
        hand = by_hand(student, torch.tensor(target), labels, keep, alpha=0.5, temperature=2.0)
        assert loss.item() == pytest.approx(hand, rel=1e-12)


def test_the_gradient_of_the_average_is_the_average_of_the_gradients():
    student, first, _, _ = batch()
    second = sample(3, 4, 7, dtype=torch.float64, seed=5)[1]
    criterion = kdloss.MultiTeacherKD([0.3, 0.7], alpha=0.0)
    slope = grad(criterion(student, [first, second]), student)[0]
    single = kdloss.VanillaKD(alpha=0.0)
    parts = [grad(single(student, teacher), student)[0] for teacher in (first, second)]
    torch.testing.assert_close(slope, 0.3 * parts[0] + 0.7 * parts[1])


def test_teachers_of_other_vocabularies_are_averaged_by_the_sum_that_the_error_says():
    student, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    outputs = [torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)]
    for criterion in (kdloss.MultiTeacherKD(), kdloss.MultiTeacherKD(vocabulary=kdloss.truncate)):
        with pytest.raises(ValueError, match=r"teacher 1 has logits \(4, 7\).*a term for each teacher") as caught:
            criterion(student, outputs, labels)
    written = re.search(r"0\.5 \* kdloss.*\)(?=, or)", str(caught.value)).group()
    z = student.requires_grad_()
    loss = eval(written, {"kdloss": kdloss})(z, outputs)
    log_q = z.log_softmax(-1)
    exact = sum(0.5 * (p * (p.log() - log_q)).sum(-1).mean() for p in (t[:, :6].softmax(-1) for t in outputs))
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(exact, z))


def test_weights_of_teachers_that_are_no_list_are_refused_when_they_are_given():
    z = torch.zeros(2, 3)
    for weights in (0.5, {0: 0.5, 1: 0.5}, torch.tensor(0.5), "ab", np.array([0.5, 0.5])):
        for make in (kdloss.MultiTeacherKD, lambda w: kdloss.Mixture([z, z], w)):
            with pytest.raises(TypeError, match=r"weights is a list with one number per teacher.*alpha=0\.5"):
                make(weights)
    for weights in ((0.25, 0.75), torch.tensor([0.25, 0.75])):
        assert kdloss.MultiTeacherKD(weights, alpha=0.0)(z, [z, z]).item() == 0


def test_a_class_of_divergences_is_refused_and_an_instance_is_not():
    wrappers = kdloss.divergences.standardized, kdloss.divergences.with_teacher_temperature
    for wrong in (*wrappers, partial(wrappers[1], teacher_temperature=4.0)):
        with pytest.raises(TypeError, match=r"got the class \w+; write an instance.*standardized\(kdloss\.divergences"):
            kdloss.Logits(wrong)
        with pytest.raises(TypeError, match=r"standardized wraps a divergence"):
            wrappers[0](wrong)
        with pytest.raises(TypeError, match=r"with_teacher_temperature wraps a divergence"):
            wrappers[1](wrong, 4.0)
    assert kdloss.Logits(wrappers[0](wrappers[1](kdloss.divergences.forward_kl, 4.0))).name == "kd"


def test_invalid_teachers_and_weights_are_refused():
    student, teacher, labels, _ = batch()
    with pytest.raises(ValueError, match="no teacher"):
        kdloss.MultiTeacherKD()(student, [], labels)
    with pytest.raises(TypeError, match=r"\[teacher\]"):
        kdloss.MultiTeacherKD()(student, teacher, labels)
    with pytest.raises(ValueError, match="one vocabulary"):
        kdloss.MultiTeacherKD()(student, [teacher, teacher[..., :5]], labels)
    for weights in ([0.5], [0.7, 0.7], [-0.5, 1.5], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weights"):
            kdloss.MultiTeacherKD(weights)(student, [teacher, teacher], labels)


# -- edge cases, invalid input, copies, compilation --


def test_there_may_be_zero_positions_but_not_zero_classes():
    student = torch.zeros(0, 5, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    for loss in (
        kdloss.VanillaKD()(student, torch.zeros(0, 5), labels),
        kdloss.MultiTeacherKD()(student, [torch.zeros(0, 5)], labels),
    ):
        assert loss == 0
        assert grad(loss, student)[0].shape == (0, 5)
    with pytest.raises(ValueError, match="one entry per class"):
        kdloss.divergences.forward_kl(torch.zeros(2, 0), torch.zeros(2, 0))


def test_a_student_that_is_its_own_teacher_gets_zero_loss_and_gradient():
    student = sample(3, 4, 7)[0]
    loss = kdloss.VanillaKD(alpha=0.0)(student, student)
    assert loss == 0
    assert not grad(loss, student)[0].any()


def test_criteria_give_meta_scalars_for_meta_tensors():
    student, teacher, labels, mask = (x.to("meta") for x in batch())
    loss = kdloss.VanillaKD(causal=True)(student, teacher, labels, mask=mask)
    assert loss.is_meta
    assert loss.shape == ()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_finite_and_positive_is_refused(temperature):
    for call in (
        lambda: kdloss.VanillaKD(temperature),
        lambda: kdloss.FeatureKD(temperature=temperature),
        lambda: kdloss.divergences.forward_kl(torch.zeros(3), torch.zeros(3), temperature=temperature),
    ):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            call()


@pytest.mark.parametrize("temperature", ["2", None, True, torch.tensor([1.0, 2.0])])
def test_a_temperature_of_another_type_than_a_number_is_refused(temperature):
    with pytest.raises(TypeError, match="temperature must be a number"):
        kdloss.VanillaKD(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_below_zero_or_above_one_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        kdloss.VanillaKD(alpha=alpha)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        kdloss.FeatureKD(alpha=alpha)


def test_the_error_for_different_vocabularies_names_both_sizes_and_two_solutions():
    with pytest.raises(ValueError, match=r"50257.*50272.*kdloss\.truncate.*TokenMap\.of"):
        kdloss.VanillaKD(alpha=0.0)(torch.zeros(2, 50257), torch.zeros(2, 50272))


def test_uld_compares_vocabularies_of_different_sizes_in_a_loss_with_cross_entropy():
    student, _, labels, mask = batch()
    teacher = sample(3, 4, 9, dtype=torch.float64, seed=5)[1]
    criterion = kdloss.VanillaKD(2.0, 0.3, divergence=kdloss.divergences.uld)
    loss = criterion(student, teacher, labels, mask=mask)
    keep = (mask & (labels != -100)).numpy()
    q = np.sort(np.exp(oracles.log_softmax(student.detach().numpy(), 2.0)), -1)[..., ::-1]
    p = np.sort(np.exp(oracles.log_softmax(teacher.numpy(), 2.0)), -1)[..., ::-1]
    q = np.concatenate([q, np.zeros((3, 4, 2))], -1)
    assert criterion.components["kd"].item() == pytest.approx(abs(p - q).sum(-1)[keep].mean(), rel=1e-9)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("wrong", ["jsd", torch.zeros(2), 3])
def test_a_setting_that_is_not_a_function_is_refused_with_an_example(wrong):
    for make in (kdloss.VanillaKD, kdloss.FeatureKD):
        with pytest.raises(TypeError, match=r"divergence=kdloss\.divergences\.forward_kl"):
            make(divergence=wrong)
        with pytest.raises(TypeError, match=r"vocabulary=kdloss\.truncate"):
            make(vocabulary=wrong)
    with pytest.raises(TypeError, match=r"distance=kdloss\.distances\.mse"):
        kdloss.FeatureKD(distance=wrong)


def test_a_divergence_without_a_temperature_argument_is_refused_at_construction():
    def gap(student, teacher):
        return (student - teacher).square().sum(-1)

    with pytest.raises(TypeError, match=r"def gap\(student, teacher, \*, temperature=1.0\)"):
        kdloss.Logits(gap)
    with pytest.raises(TypeError, match="temperature"):
        kdloss.VanillaKD(divergence=gap)


def test_a_divergence_that_needs_labels_asks_for_them():
    student, teacher, labels, _ = batch()
    for divergence in (
        kdloss.divergences.dkd,
        partial(kdloss.divergences.nkd, gamma=1.0),
        kdloss.divergences.standardized(kdloss.divergences.dkd),
    ):
        criterion = kdloss.VanillaKD(alpha=0.0, divergence=divergence)
        with pytest.raises(ValueError, match=r"pass labels=\.\.\."):
            criterion(student, teacher)
        assert criterion(student, teacher, labels).isfinite()


def test_labels_and_masks_of_another_shape_or_type_are_refused():
    student, teacher, labels, _ = batch()
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(3, 4, 7\)"):
        kdloss.VanillaKD()(student, teacher, labels[:, 1:])
    with pytest.raises(TypeError, match=r"labels\.long\(\).*logits' shape \(3, 4, 7\); got .* \(3, 4\)"):
        kdloss.VanillaKD()(student, teacher, labels.float())
    with pytest.raises(ValueError, match="mask"):
        kdloss.VanillaKD()(student, teacher, labels, mask=MASK[:, 1:])


def test_check_finite_names_the_tensor_and_the_first_index():
    student, teacher, labels, _ = batch()
    criterion = kdloss.VanillaKD(check_finite=True)
    assert criterion(student, teacher, labels).isfinite()
    bad = teacher.clone()
    bad[0, 0, 3] = float("nan")  # an ignored position
    bad[1, 2, 4] = float("nan")
    with pytest.raises(ValueError, match=r"teacher\[1, 2, 4\] is nan"):
        criterion(student, bad, labels)
    assert kdloss.VanillaKD()(student, bad, labels).isnan()
    labels[2, 1] = 7
    for causal in (False, True):
        with pytest.raises(ValueError, match=r"labels\[2, 1\] is 7, outside the 7 classes"):
            kdloss.VanillaKD(check_finite=True, causal=causal)(student, teacher, labels)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_check_finite_looks_at_every_position_that_counts_and_at_no_other(whose, causal):
    student, teacher, labels, mask = batch()
    criterion = kdloss.VanillaKD(check_finite=True, causal=causal)
    counts = mask & (labels != -100)
    if causal:  # a position learns the next one's label
        counts = F.pad(counts[:, 1:], (0, 1), value=False)
    for b, t in np.ndindex(3, 4):
        spoilt = (student if whose == "student" else teacher).detach().clone()
        spoilt[b, t, 2] = float("nan")
        given = (spoilt, teacher) if whose == "student" else (student, spoilt)
        if counts[b, t]:
            with pytest.raises(ValueError, match=rf"{whose}\[{b}, {t}, 2\] is nan"):
                criterion(*given, labels, mask=mask)
        else:
            assert criterion(*given, labels, mask=mask).isfinite()


CRITERIA = [
    kdloss.VanillaKD(3.0, 0.2),
    kdloss.MultiTeacherKD([1.0]),
    kdloss.FeatureKD("late", depths=(4, 8), widths=(5, 6), pairing="last", logit_weight=1.0),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_criteria_survive_deepcopy_pickle_and_state_dict(criterion):
    student, teacher = feature_outputs(s_width=5, t_width=6)
    labels = torch.randint(0, 7, (3, 4))
    target = [teacher] if isinstance(criterion, kdloss.MultiTeacherKD) else teacher
    loss = criterion(student, target, labels)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(student, target, labels), loss)
        assert repr(twin) == repr(criterion)
        twin.load_state_dict(criterion.state_dict())
        for mine, its in zip(criterion.parameters(), twin.parameters(), strict=True):
            assert mine is not its


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_criteria_compile_without_a_graph_break(criterion):
    student, teacher = feature_outputs(s_width=5, t_width=6)
    labels = torch.randint(0, 7, (3, 4))
    target = [teacher.logits] if isinstance(criterion, kdloss.MultiTeacherKD) else teacher
    plain = criterion(student, target, labels, mask=MASK)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, target, labels, mask=MASK), plain)


NAMELESS = [kdloss.divergences.standardized(getattr(kdloss.divergences, name)) for name in ("forward_kl", "jsd", "dkd")]


@pytest.mark.parametrize("divergence", NAMELESS, ids=lambda d: d.divergence.__name__)
def test_a_divergence_without_a_name_compiles_inside_a_criterion(divergence):
    labels, teacher = torch.randint(0, 7, (3, 4)), torch.randn(3, 4, 7)
    student = torch.randn(3, 4, 7, requires_grad=True)
    criterion = kdloss.VanillaKD(3.0, 0.4, divergence=divergence)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    values = [c(student, teacher, labels, mask=MASK) for c in (compiled, criterion)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student) for value in values))


MAKERS = {
    "VanillaKD": lambda: kdloss.VanillaKD(3.0, 0.4),
    "standardized": lambda: kdloss.VanillaKD(divergence=kdloss.divergences.standardized(kdloss.divergences.dkd)),
    "relational": lambda: kdloss.VanillaKD(divergence=kdloss.divergences.standardized(kdloss.divergences.dist)),
    "scheduled": lambda: kdloss.VanillaKD(temperature=kdloss.schedules.linear(1.0, 2.0, steps=10)),
    "task": lambda: 1.0 * kdloss.Task(lambda output, labels: output.square().mean(-1)),
}


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch.compile cannot trace the construction of modules")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_criterion_made_inside_a_compiled_function_equals_one_made_outside(kind):
    student, teacher, labels = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7), torch.tensor([0, 6, 2])

    def loss(s, t, y):
        return MAKERS[kind]()(s, t, y)

    torch._dynamo.reset()
    values = [f(student, teacher, labels) for f in (torch.compile(loss, fullgraph=True, backend="eager"), loss)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student) for value in values))


@pytest.mark.skipif(torch.__version__ >= (2, 13), reason="torch.compile traces the construction of modules")
@since_torch(2, 10)
def test_a_criterion_made_inside_a_compiled_function_breaks_the_graph_or_is_refused_with_a_reason():
    student, teacher, labels = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, 6, 2])

    def loss(s, t, y):
        return kdloss.VanillaKD(3.0, 0.4)(s, t, y)

    torch._dynamo.reset()
    with pytest.raises(
        Exception, match=r"made inside a function compiled with fullgraph=True: make terms and criteria "
    ):
        torch.compile(loss, fullgraph=True, backend="eager")(student, teacher, labels)
    torch._dynamo.reset()
    broken = torch.compile(loss, backend="eager")(student, teacher, labels)
    torch.testing.assert_close(broken, loss(student, teacher, labels))


# -- outputs without classes: one number, several binary outputs --

ONE_CLASS_ERROR = "one class.*logit_mse.*bernoulli_kl"
NEEDS_CLASSES = [n for n in kdloss.divergences.__all__ if n not in ("logit_mse", "bernoulli_kl")]
# How the divergences that need further arguments get them.
COMPLETE = {
    "standardized": lambda f: f(kdloss.divergences.forward_kl),
    "with_teacher_temperature": lambda f: f(kdloss.divergences.forward_kl, 4.0),
    "sinkhorn": partial(partial, cost=torch.zeros(1, 1)),
}


@pytest.mark.parametrize("name", NEEDS_CLASSES)
def test_a_divergence_of_probabilities_refuses_one_class(name):
    divergence = getattr(kdloss.divergences, name)
    divergence = COMPLETE.get(name, partial)(divergence)
    student, teacher = torch.randn(8, 1), torch.randn(8, 1)
    lazy = kdloss.LazyLogits(torch.randn(8, 3), torch.randn(1, 3))
    for s in (student, lazy):
        with pytest.raises(ValueError, match=ONE_CLASS_ERROR):
            kdloss.VanillaKD(1.0, 0.0, divergence=divergence)(s, teacher, torch.zeros(8).long())
    criterion = kdloss.Logits(kdloss.divergences.logit_mse) + kdloss.Logits(divergence, name="second")
    with pytest.raises(ValueError, match=ONE_CLASS_ERROR):
        criterion(student, teacher, torch.zeros(8).long())


def test_a_cross_entropy_refuses_one_class_whatever_the_labels_are():
    student, teacher = torch.randn(8, 1), torch.randn(8, 1)
    for labels, error in (
        (torch.zeros(8).long(), ValueError),
        (torch.rand(8), TypeError),
        (torch.rand(8, 1), TypeError),
    ):
        for criterion in (kdloss.VanillaKD(1.0, 0.5), kdloss.VanillaKD(1.0, 1.0), 1.0 * kdloss.CrossEntropy()):
            with pytest.raises(error, match=r"one class.*kdloss\.Task") as raised:
                criterion(student, teacher, labels)
            assert ".long()" not in str(raised.value)


def test_a_common_vocabulary_of_one_class_is_refused():
    with pytest.raises(ValueError, match="leaves one"):
        kdloss.VanillaKD(1.0, 0.0, vocabulary=kdloss.truncate)(
            torch.randn(3, 4), kdloss.TopKLogits.of(torch.randn(3, 1), 1)
        )


def test_one_output_is_distilled_by_the_terms_that_the_error_names():
    s, t = torch.randn(8, 1, dtype=torch.float64, requires_grad=True), torch.randn(8, 1, dtype=torch.float64)
    y = torch.rand(8, dtype=torch.float64)
    task = kdloss.Task(lambda output, labels: (output.logits.squeeze(-1) - labels).square())
    loss = (task + kdloss.Logits(kdloss.divergences.logit_mse))(Output(logits=s), Output(logits=t), y)
    expected = ((s.squeeze(-1) - y) ** 2).mean() + ((s - t) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s))
    loss = kdloss.VanillaKD(1.0, 0.0, divergence=kdloss.divergences.bernoulli_kl)(s, t, y)
    p, q = t.sigmoid(), s.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s))


@pytest.mark.parametrize("labels", [torch.rand(8), torch.rand(8, 3), torch.full((8, 4), torch.nan)])
def test_float_labels_that_no_term_reads_are_not_checked(labels):
    s, t = torch.randn(8, 5), torch.randn(8, 5)
    for criterion in (kdloss.VanillaKD(1.0, 0.0, check_finite=True), 0.0 * kdloss.CrossEntropy() + kdloss.Logits()):
        assert criterion(s, t, labels) == criterion(s, t)


@pytest.mark.parametrize(
    ("labels", "error"),
    [(torch.rand(8), TypeError), (torch.rand(8, 3), ValueError), (torch.ones(8, 5).long(), ValueError)],
)
def test_the_error_for_labels_that_are_not_classes_names_the_alternatives(labels, error):
    for criterion in (kdloss.VanillaKD(1.0, 0.5), 1.0 * kdloss.CrossEntropy()):
        with pytest.raises(error, match=r"kdloss\.Task.*logit_mse.*binary_cross_entropy_with_logits.*bernoulli_kl"):
            criterion(torch.randn(8, 5), torch.randn(8, 5), labels)


def test_several_binary_outputs_are_distilled_by_the_terms_that_the_error_names():
    s, t = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    y = torch.randint(0, 2, (8, 5)).float()
    task = kdloss.Task(torch.nn.functional.binary_cross_entropy_with_logits)
    loss = (task + kdloss.Logits(kdloss.divergences.bernoulli_kl))(s, t, y)
    p, q = t.sigmoid(), s.sigmoid()
    expected = -(y * q.log() + (1 - y) * (1 - q).log()).mean()
    expected = expected + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s), rtol=1e-4, atol=1e-6)
