"""Properties of single divergences beyond the laws, and the behaviour of those that are exempt from a law."""

import copy
import inspect
import pickle
from functools import partial

import mpmath
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from losses import sample

import kdloss

INF, NAN = float("inf"), float("nan")


def grad(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs)


# -- between forward and reverse KL --


def test_jsd_is_exactly_forward_kl_at_0_and_reverse_kl_at_1():
    student, teacher = sample(4, 7)
    for beta, plain in ((0.0, kdloss.divergences.forward_kl), (1.0, kdloss.divergences.reverse_kl)):
        for normalize in (False, True):
            value = kdloss.divergences.jsd(student, teacher, temperature=2.0, beta=beta, normalize=normalize)
            assert torch.equal(value, plain(student, teacher, temperature=2.0))


def test_normalised_jsd_converges_to_both_kls_and_plain_jsd_to_0():
    student, teacher = sample(4, 7, dtype=torch.float64)
    for beta, plain in ((1e-6, kdloss.divergences.forward_kl), (1 - 1e-6, kdloss.divergences.reverse_kl)):
        exact = plain(student, teacher)
        value = kdloss.divergences.jsd(student, teacher, beta=beta, normalize=True)
        torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
        torch.testing.assert_close(grad(value, student), grad(exact, student), rtol=1e-2, atol=1e-3)
        assert (kdloss.divergences.jsd(student, teacher, beta=beta) < 2e-6 * exact).all()


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.3, 1 - 1e-3, 1 - 1e-6])
def test_jsd_in_float32_agrees_with_fifty_digits_at_tiny_weights(beta):
    logits = [[4.0, -3.0, 0.5, -60.0], [-2.0, 3.0, 0.25, 30.0]]
    with mpmath.workdps(50):
        q, p = ([mpmath.exp(z) / sum(map(mpmath.exp, row)) for z in row] for row in logits)
        b = mpmath.mpf(beta)
        m = [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]
        kls = [sum(x * mpmath.log(x / z) for x, z in zip(a, m, strict=True)) for a in (p, q)]
        exact = float(b * kls[0] + (1 - b) * kls[1])
    student, teacher = torch.tensor(logits)
    assert kdloss.divergences.jsd(student, teacher, beta=beta).item() == pytest.approx(exact, rel=1e-5)


def test_a_skewed_kl_is_bounded_and_without_skew_equals_the_plain_kl():
    student, teacher = sample(4, 7)
    for skewed, plain in (
        (kdloss.divergences.skewed_forward_kl, kdloss.divergences.forward_kl),
        (kdloss.divergences.skewed_reverse_kl, kdloss.divergences.reverse_kl),
    ):
        assert torch.equal(skewed(student, teacher, skew=0.0), plain(student, teacher))
        assert not skewed(student, teacher, skew=1.0).any()
        one, other = torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0])
        assert skewed(one, other, skew=0.25).item() == pytest.approx(np.log(4))


def test_symmetric_kl_and_jsd_at_one_half_are_symmetric():
    student, teacher = (x.detach() for x in sample(4, 7, dtype=torch.float64))
    for loss in (kdloss.divergences.symmetric_kl, kdloss.divergences.jsd):
        torch.testing.assert_close(loss(student, teacher), loss(teacher, student))


def test_adaptive_kl_weighs_by_the_difference_in_head_and_tail():
    p, q = np.array([0.4, 0.35, 0.15, 0.1]), np.array([0.1, 0.35, 0.35, 0.2])
    student, teacher = torch.tensor(np.log([q, p]))
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    for head, share in ((0.5, 0.3 / 0.6), (0.1, 0.3 / 0.6), (0.91, 0.5 / 0.6)):
        exact = share * forward + (1 - share) * reverse
        assert kdloss.divergences.adaptive_kl(student, teacher, head=head).item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("teacher", [[0.0, -8000.0, -8000.0], [0.0, -8.0, -9000.0]])
def test_the_weights_of_adaptive_kl_are_precise_where_head_and_tail_hardly_differ(teacher):
    student, teacher = torch.tensor([[0.0, -8.1, -12.0]]), torch.tensor([teacher])
    exact = oracles.adaptive_kl(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(kdloss.divergences.adaptive_kl(student, teacher), exact, rtol=1e-5)


def test_the_weights_of_adaptive_kl_are_constants_for_the_gradient():
    student, teacher = sample(1, 6, dtype=torch.float64)
    forward, reverse = (
        kdloss.divergences.forward_kl(student, teacher),
        kdloss.divergences.reverse_kl(student, teacher),
    )
    value = kdloss.divergences.adaptive_kl(student, teacher)
    share = ((value - reverse) / (forward - reverse)).detach()
    assert 0 < share < 1
    exact = grad(share * forward + (1 - share) * reverse, student)
    torch.testing.assert_close(grad(value, student), exact, rtol=1e-9, atol=1e-12)


# -- logits and single classes --


def test_logit_mse_and_bernoulli_kl_depend_on_a_constant_that_a_softmax_ignores():
    teacher = torch.zeros(1, 4, dtype=torch.float64)
    assert kdloss.divergences.logit_mse(teacher + 3, teacher).item() == pytest.approx(9.0)
    odds = 4 * (0.5 * np.log(0.5 * (1 + np.exp(-3.0))) + 0.5 * np.log(0.5 * (1 + np.exp(3.0))))
    assert kdloss.divergences.bernoulli_kl(teacher + 3, teacher).item() == pytest.approx(odds)


def test_a_class_that_both_sides_exclude_adds_nothing_to_logit_mse_and_bernoulli_kl():
    student, teacher = sample(4, 7)
    extra = torch.full((4, 2), -torch.inf)
    for loss in (kdloss.divergences.logit_mse, kdloss.divergences.bernoulli_kl):
        value = loss(torch.cat([student, extra], 1), torch.cat([teacher, extra], 1))
        torch.testing.assert_close(value, loss(student, teacher))
        assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_temperature_does_not_change_logit_mse_and_is_still_checked():
    student, teacher = sample(4, 7)
    assert torch.equal(
        kdloss.divergences.logit_mse(student, teacher, temperature=9.0),
        kdloss.divergences.logit_mse(student, teacher),
    )
    with pytest.raises(ValueError, match="temperature"):
        kdloss.divergences.logit_mse(student, teacher, temperature=0.0)


# -- losses with labels --


def test_forward_kl_equals_dkd_with_weights_1_and_one_minus_the_probability_of_the_label():
    student, teacher = sample(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 3, 6, 2, 2])
    T = 2.0
    target = kdloss.divergences.dkd(student, teacher, labels, temperature=T, beta=0.0)
    others = kdloss.divergences.dkd(student, teacher, labels, temperature=T, alpha=0.0, beta=1.0)
    p_y = (teacher / T).softmax(-1).gather(-1, labels[:, None])[:, 0]
    expected = kdloss.divergences.forward_kl(student, teacher, temperature=T)
    torch.testing.assert_close(target + (1 - p_y) * others, expected, rtol=1e-12, atol=0)
    slope = grad(target + (1 - p_y) * others, student)
    torch.testing.assert_close(slope, grad(expected, student), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_has_the_gradient_of_the_paper_and_its_value_minus_an_entropy(temperature):
    student, teacher = sample(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 3, 6, 2, 2])
    rows = torch.arange(5)
    rest = torch.ones(5, 7, dtype=torch.bool)
    rest[rows, labels] = False
    s, t = (x[rest].view(5, 6) / temperature for x in (student, teacher))
    p_y = teacher.softmax(-1)[rows, labels]
    soft = t.softmax(-1)
    paper = p_y * F.cross_entropy(student, labels, reduction="none") + 1.5 * temperature**2 * (
        -(soft * s.log_softmax(-1)).sum(-1)
    )
    entropy = -(soft * soft.log()).sum(-1)
    value = kdloss.divergences.nkd(student, teacher, labels, temperature=temperature)
    torch.testing.assert_close(value, paper - 1.5 * temperature**2 * entropy, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad(value, student), grad(paper, student), rtol=1e-10, atol=1e-14)


def test_nkd_at_the_teacher_is_a_cross_entropy_with_a_gradient():
    _, teacher = sample(3, 5, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    labels = torch.tensor([4, 0, 1])
    p = teacher.softmax(-1)
    p_y = p[torch.arange(3), labels]
    value = kdloss.divergences.nkd(student, teacher, labels)
    torch.testing.assert_close(value, -p_y * p_y.log())
    torch.testing.assert_close(grad(value, student)[0], p_y[:, None] * (p - F.one_hot(labels, 5)))


@pytest.mark.parametrize(
    "loss",
    [
        kdloss.divergences.dkd,
        kdloss.divergences.nkd,
        kdloss.divergences.standardized(kdloss.divergences.dkd),
    ],
)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_logits_at_an_ignored_label_have_no_effect(loss, garbage):
    student, teacher = sample(3, 5)
    labels = torch.tensor([1, -100, 4])
    counted = [0, 2]
    clean = loss(student[counted], teacher[counted], labels[counted], temperature=2.0)
    dirty, dirty_teacher = student.detach().clone(), teacher.clone()
    dirty[1] = dirty_teacher[1] = garbage
    dirty.requires_grad_()
    value = loss(dirty, dirty_teacher, labels, temperature=2.0)
    assert value[1] == 0
    assert torch.equal(value[counted], clean)
    slope = grad(value, dirty)[0]
    assert not slope[1].any()
    torch.testing.assert_close(slope[counted], grad(clean, student)[0][counted])


@pytest.mark.parametrize("loss", [kdloss.divergences.dkd, kdloss.divergences.nkd])
def test_labels_of_another_type_or_shape_are_refused(loss):
    student, teacher = sample(3, 5)
    with pytest.raises(TypeError, match=r"labels\.long\(\)"):
        loss(student, teacher, torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        loss(student, teacher, torch.zeros(3, 1, dtype=torch.int64))


def test_without_a_class_beside_the_label_dkd_and_nkd_are_0():
    rows = torch.tensor([[2.0, -INF, -INF]], requires_grad=True)
    labels = torch.tensor([0])
    for loss in (kdloss.divergences.dkd, kdloss.divergences.nkd):
        value = loss(rows, rows.detach(), labels)
        assert value.item() == 0
        assert not grad(value, rows)[0].any()


def test_with_other_classes_on_one_side_only_the_probability_of_the_label_is_compared():
    label_only, all_classes = torch.tensor([[0.0, -INF, -INF]]), torch.tensor([[0.0, 1.0, 2.0]])
    labels = torch.tensor([0])
    minus_log_q = F.cross_entropy(all_classes, labels).item()
    assert kdloss.divergences.dkd(all_classes, label_only, labels).item() == pytest.approx(minus_log_q)
    assert kdloss.divergences.nkd(all_classes, label_only, labels).item() == pytest.approx(minus_log_q)
    assert kdloss.divergences.dkd(label_only, all_classes, labels) == INF


def test_an_infinite_term_with_weight_0_adds_nothing():
    teacher, labels = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])
    no_label, no_other = torch.tensor([[-INF, 1.0, 2.0]]), torch.tensor([[0.0, -INF, 2.0]])
    assert kdloss.divergences.dkd(no_label, teacher, labels) == INF
    assert kdloss.divergences.dkd(no_label, teacher, labels, alpha=0.0).item() == pytest.approx(0, abs=1e-6)
    assert kdloss.divergences.dkd(no_other, teacher, labels) == INF
    assert kdloss.divergences.dkd(no_other, teacher, labels, beta=0.0).isfinite()
    assert kdloss.divergences.nkd(no_other, teacher, labels, gamma=0.0).isfinite()


# -- relations --


def test_dist_is_one_minus_numpy_s_correlation_of_rows_and_columns():
    student, teacher = sample(6, 4, dtype=torch.float64)
    q, p = ((x / 2).softmax(-1).detach().numpy() for x in (student, teacher))
    rows = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    value = kdloss.divergences.dist(student, teacher, temperature=2.0, beta=3.0, gamma=0.5)
    np.testing.assert_allclose(value.detach(), 4 * (3 * rows + 0.5 * columns), rtol=1e-9)


def test_dist_correlates_only_the_positions_that_count():
    student, teacher = sample(3, 2, 5, dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    value = kdloss.divergences.dist(student, teacher, mask=mask)
    selected = kdloss.divergences.dist(student[mask], teacher[mask])
    torch.testing.assert_close(value[mask], selected, rtol=1e-12, atol=0)
    assert not value[~mask].any()
    torch.testing.assert_close(grad(value, student)[0], grad(selected, student)[0], rtol=1e-10, atol=1e-14)
    dirty = student.detach().clone()
    dirty[~mask] = NAN
    dirty.requires_grad_()
    dirty_value = kdloss.divergences.dist(dirty, teacher, mask=mask)
    assert torch.equal(dirty_value, value)
    assert not grad(dirty_value, dirty)[0][~mask].any()


def test_micro_batches_of_dist_do_not_add_up_as_its_docstring_says():
    student, teacher = sample(6, 5, dtype=torch.float64)
    halves = torch.cat([kdloss.divergences.dist(student[cut], teacher[cut]) for cut in (slice(3), slice(3, 6))])
    assert abs(halves.mean() - kdloss.divergences.dist(student, teacher).mean()) > 1e-3


def test_dist_refuses_a_single_position_unless_gamma_is_0():
    student, teacher = sample(1, 5)
    with pytest.raises(ValueError, match="gamma=0"):
        kdloss.divergences.dist(student, teacher)
    assert kdloss.divergences.dist(student, teacher, gamma=0.0).shape == (1,)
    masked = kdloss.divergences.dist(*sample(3, 5), mask=torch.tensor([True, False, False]))
    assert masked.isfinite().all()


def test_dist_treats_a_class_that_both_exclude_as_probability_0():
    student, teacher = sample(4, 5, dtype=torch.float64)
    extra = torch.full((4, 1), -INF)
    wide = [torch.cat([x.detach(), extra], 1) for x in (student, teacher)]
    q, p = (x.softmax(-1).numpy() for x in wide)
    rows = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    np.testing.assert_allclose(kdloss.divergences.dist(*wide, gamma=0.0), rows, rtol=1e-9)


# -- wrappers, and vocabularies of two sizes --


@pytest.mark.parametrize("classes", [2, 7])
def test_standardised_losses_ignore_shift_and_scale_and_use_the_sample_deviation(classes):
    student, teacher = sample(4, classes, dtype=torch.float64)
    loss = kdloss.divergences.standardized(kdloss.divergences.forward_kl)
    value = loss(student, teacher, temperature=2.0)
    moved = loss(20 * student - 3, teacher / 7 + 100, temperature=2.0)
    torch.testing.assert_close(moved, value, rtol=1e-5, atol=1e-9)
    z = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(value, kdloss.divergences.forward_kl(*z, temperature=2.0), rtol=1e-5, atol=1e-9)


def test_standardised_losses_can_be_pickled_and_copied_and_have_the_signature_of_the_loss():
    student, teacher = sample(4, 7)
    labels = torch.tensor([0, 1, 2, -100])
    loss = kdloss.divergences.standardized(partial(kdloss.divergences.dkd, beta=2.0))
    value = loss(student, teacher, labels, temperature=2.0)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(student, teacher, labels, temperature=2.0), value)
    assert "labels" in inspect.signature(loss).parameters
    assert "labels" not in inspect.signature(kdloss.divergences.standardized(kdloss.divergences.jsd)).parameters
    criterion = kdloss.VanillaKD(divergence=kdloss.divergences.standardized(kdloss.divergences.forward_kl), alpha=0.0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(criterion)))
    assert torch.equal(twin(student, teacher), criterion(student, teacher))
    with pytest.raises(TypeError, match="forward_kl"):
        kdloss.divergences.standardized("forward_kl")


def test_uld_compares_vocabularies_of_any_sizes_and_ignores_the_order():
    student = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.05, 0.2, 0.05, 0.7]], dtype=torch.float64).log()
    value = kdloss.divergences.uld(student, teacher)  # .6 .3 .1 0 against .7 .2 .05 .05
    assert value.item() == pytest.approx(0.1 + 0.1 + 0.05 + 0.05)
    assert kdloss.divergences.uld(teacher, student).item() == pytest.approx(0.3)
    sides = teacher.expand(2, 2, 4), student.expand(2, 2, 3)
    for several in (kdloss.divergences.uld(*sides), kdloss.divergences.uld(*reversed(sides))):
        np.testing.assert_allclose(several.detach(), np.full((2, 2), 0.3))
    assert kdloss.divergences.uld(student, teacher[:, [3, 0, 1, 2]]).item() == pytest.approx(0.3)
    assert not kdloss.divergences.uld(student, student.detach().flip(1)).any()
    assert torch.autograd.gradcheck(kdloss.divergences.uld, (student, teacher))
    for other in (teacher[0], teacher[None], torch.zeros(2, 4), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match=r"\(1, 3\)"):
            kdloss.divergences.uld(student, other)


# -- settings --


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        (kdloss.divergences.jsd, {"beta": 1.5}, "beta"),
        (kdloss.divergences.jsd, {"beta": NAN}, "beta"),
        (kdloss.divergences.skewed_forward_kl, {"skew": -0.1}, "skew"),
        (kdloss.divergences.skewed_reverse_kl, {"skew": 1.1}, "skew"),
        (kdloss.divergences.adaptive_kl, {"head": 2}, "head"),
        (kdloss.divergences.dist, {"gamma": -1.0}, "gamma"),
        (
            partial(kdloss.divergences.dkd, labels=torch.zeros(2, dtype=torch.int64)),
            {"alpha": -1.0},
            "alpha",
        ),
        (
            partial(kdloss.divergences.nkd, labels=torch.zeros(2, dtype=torch.int64)),
            {"gamma": INF},
            "gamma",
        ),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(loss, options, words):
    with pytest.raises(ValueError, match=words):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), **options)


KLS = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "bernoulli_kl",
)


@pytest.mark.parametrize("name", KLS)
def test_without_t_squared_the_loss_is_divided_by_the_squared_temperature(name):
    student, teacher = sample(4, 7, dtype=torch.float64)
    loss = getattr(kdloss.divergences, name)
    value = loss(student, teacher, temperature=3.0)
    plain = loss(student, teacher, temperature=3.0, t_squared=False)
    torch.testing.assert_close(value, 9 * plain)
    torch.testing.assert_close(grad(value, student)[0], 9 * grad(plain, student)[0])
    twice = [loss(student, teacher, temperature=3.0, t_squared=flag).sum() for flag in (True, False)]
    slopes = [torch.autograd.grad(value, student, create_graph=True)[0] for value in twice]
    torch.testing.assert_close(slopes[0], 9 * slopes[1])  # second derivatives have the same factor
