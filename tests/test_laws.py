"""Laws that hold for every exported loss; a new loss is included once it is exported (tests/losses.py)."""

from dataclasses import replace
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import DISTANCES, DIVERGENCES, LOSSES, ONE_EACH, TOLERANCE, labels_for, sample
from versions import since_torch

import kdloss
from kdloss.engine.task import as_written

# Numerical laws are checked at every temperature, the others at one temperature; both with every option of a loss.
at_every_temperature = pytest.mark.parametrize("loss", LOSSES, ids=str)
AT_ONE_TEMPERATURE = [*ONE_EACH, *DISTANCES]
every_loss = pytest.mark.parametrize("loss", AT_ONE_TEMPERATURE, ids=str)


def not_exempt(*reasons, of=LOSSES):
    """Parametrize a test over the losses of `of` that are not exempt for one of these reasons."""
    return pytest.mark.parametrize("loss", [x for x in of if not x.exempt & set(reasons)], ids=str)


def masked(loss, student, teacher, mask=None, **reduction):
    return kdloss.masked(loss.bare(student), student, teacher, mask, **reduction)


def grad(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs)


@not_exempt("teacher")
def test_loss_and_gradient_are_exactly_zero_at_the_teacher(loss):
    _, teacher = loss.sample(4, 7)
    student = teacher.clone().requires_grad_()
    value = loss.call(student, teacher)
    assert value.tolist() == [0.0] * 4
    assert not grad(value, student)[0].any()


@at_every_temperature
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.floats(-30, 30, width=32), min_size=48, max_size=48))
def test_values_are_finite_and_not_negative(loss, rows):
    student, teacher = torch.tensor(rows[: 8 * loss.width(3)]).view(2, 4, -1)
    value = loss.call(student, teacher)
    assert "negative" in loss.exempt or (value >= -loss.rounding).all()
    assert value.isfinite().all()


@not_exempt("shift", of=DIVERGENCES)
def test_a_constant_added_to_logits_changes_nothing(loss):
    student, teacher = loss.sample(4, 7, dtype=torch.float64)
    value = loss.call(student, teacher)
    moved = loss.call(student + 100.0, teacher - 50.0)
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad(moved, student), grad(value, student), rtol=1e-9, atol=1e-9)


def test_normalised_distances_ignore_the_scale_or_shift_that_they_normalise():
    student, teacher = sample(4, 7, dtype=torch.float64)
    scaled = kdloss.distances.cosine(5 * student, teacher / 7)
    torch.testing.assert_close(scaled, kdloss.distances.cosine(student, teacher))
    both = kdloss.distances.normalized_mse(1e4 * student, 1e4 * teacher)
    torch.testing.assert_close(both, kdloss.distances.normalized_mse(student, teacher), rtol=1e-6, atol=0)
    moved = kdloss.distances.layer_norm_mse(20 * student + 3, teacher)
    torch.testing.assert_close(moved, kdloss.distances.layer_norm_mse(student, teacher), rtol=1e-5, atol=0)


@at_every_temperature
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value_and_gradient_agree_with_the_float64_oracle(loss, dtype):
    student, teacher = loss.sample(5, 9, dtype=dtype)
    value = loss.call(student, teacher)
    slope = grad(value, student)[0]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert slope.dtype == dtype
    s, t = student.detach().double().numpy(), teacher.double().numpy()
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(value.detach(), loss.expected(s, t), rtol=tolerance, atol=tolerance)
    exact = loss.slope(s, t)
    # a gradient has the dtype of its input, so it cannot be more exact than the rounding to that dtype
    rounding = max(tolerance, torch.finfo(dtype).eps)
    np.testing.assert_allclose(slope.double(), exact, rtol=rounding, atol=tolerance * abs(exact).max())


@not_exempt(of=DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_in_a_criterion_value_and_gradient_agree_with_the_float64_oracle(loss, dtype):
    """Inside a criterion the engine computes both, by closed forms where it has them."""
    student, teacher = loss.sample(5, 9, dtype=dtype)
    options = {name: value for name, value in loss.settings.items() if name != "temperature"}
    criterion = kdloss.VanillaKD(
        loss.settings["temperature"], 0.0, divergence=partial(loss.function, **options), reduction="sum"
    )
    value = criterion(student, teacher, labels_for(student.shape) if loss.labelled else None)
    s, t = student.detach().double().numpy(), teacher.double().numpy()
    tolerance = TOLERANCE[dtype]
    assert value.item() == pytest.approx(loss.expected(s, t).sum(), rel=tolerance, abs=tolerance)
    exact = loss.slope(s, t)
    slope = grad(value, student)[0].double()
    np.testing.assert_allclose(slope, exact, rtol=tolerance, atol=tolerance * abs(exact).max())


@not_exempt("frozen")
def test_gradcheck_and_gradgradcheck_hold(loss):
    student, teacher = loss.sample(4, 3, dtype=torch.float64)
    student = (student / 3).detach().requires_grad_()
    assert torch.autograd.gradcheck(loss.call, (student, teacher / 3))
    assert torch.autograd.gradgradcheck(loss.call, (student, teacher / 3))


@every_loss
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = loss.sample(4, 5)
    teacher.requires_grad_()
    loss.call(student, teacher).sum().backward()
    assert teacher.grad is None


@not_exempt("teacher")
def test_a_student_that_is_the_same_tensor_as_the_teacher_gets_zeros(loss):
    both = loss.sample(4, 7)[0]
    value = loss.call(both, both)
    assert value.tolist() == [0.0] * 4
    assert not grad(value, both)[0].any()


@at_every_temperature
def test_inputs_are_not_modified_and_memory_layout_does_not_matter(loss):
    student, teacher = loss.sample(6, 4, 5)
    before = student.detach().clone(), teacher.clone()
    value = loss.call(student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    strided = loss.call(student.mT.contiguous().mT, teacher.mT.contiguous().mT)
    torch.testing.assert_close(strided, value)
    row = teacher[:1].expand(6, -1, -1)
    torch.testing.assert_close(loss.call(student, row), loss.call(student, row.clone()))


@every_loss
def test_same_inputs_give_the_same_bits(loss):
    student, teacher = loss.sample(8, 33)
    first, second = loss.call(student, teacher), loss.call(student, teacher)
    assert torch.equal(first, second)
    assert torch.equal(grad(first, student)[0], grad(second, student)[0])


@not_exempt("relational", of=AT_ONE_TEMPERATURE)
def test_a_single_entry_and_an_empty_batch_are_accepted(loss):
    value = loss.call(torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 2.0))
    assert value.shape == (1,)
    assert value.isfinite().all()
    assert loss.call(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@not_exempt("relational", of=AT_ONE_TEMPERATURE)
def test_positions_in_several_axes_have_the_values_and_gradients_of_positions_in_one(loss):
    student, teacher = loss.sample(2, 3, 4, dtype=torch.float64)
    for function in (loss.function, as_written(loss.function)):
        loss = replace(loss, function=function)
        value, flat = loss.call(student, teacher), loss.call(student.flatten(0, 1), teacher.flatten(0, 1))
        torch.testing.assert_close(value.flatten(), flat)
        torch.testing.assert_close(grad(value, student), grad(flat, student))


@at_every_temperature
def test_constant_and_zero_positions_have_finite_values_and_gradients(loss):
    rows = torch.tensor([[0.0], [5.0], [0.0], [5.0]]).repeat(1, loss.width(3))
    student = rows.clone().requires_grad_()
    value = loss.call(student, rows.flip(0).roll(1, 0))
    assert value.isfinite().all()
    assert grad(value, student)[0].isfinite().all()


@at_every_temperature
def test_duplicate_positions_have_finite_values_gradients_and_second_derivatives(loss):
    student, teacher = (x.repeat(2, 1).detach() for x in loss.sample(2, 5, dtype=torch.float64))
    student.requires_grad_()
    value = loss.call(student, teacher.flip(0))
    slope = torch.autograd.grad(value.sum(), student, create_graph=True)[0]
    assert value.isfinite().all()
    assert slope.isfinite().all()
    if "frozen" not in loss.exempt and slope.requires_grad:
        assert grad(slope.square(), student)[0].isfinite().all()


# -- mask and reduction, which are the same for all losses --


@every_loss
def test_reduction_mean_is_the_mean_over_the_valid_positions(loss):
    student, teacher = loss.sample(3, 4, 5)
    mask = torch.rand(3, 4) > 0.4
    none = masked(loss, student, teacher, mask, reduction="none")
    mean = masked(loss, student, teacher, mask)
    total = masked(loss, student, teacher, mask, reduction="sum")
    assert not none[~mask].any()
    torch.testing.assert_close(mean, none[mask].mean())
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(grad(mean, student), grad(none[mask].mean(), student))


@every_loss
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_at_masked_positions_change_nothing(loss, garbage):
    student, teacher = loss.sample(3, 4, 5)
    mask = torch.rand(3, 4) > 0.4
    clean = masked(loss, student, teacher, mask)
    clean_grad = grad(clean, student)[0]
    dirty = student.detach().clone()
    dirty[~mask] = garbage
    dirty_teacher = teacher.clone()
    dirty_teacher[~mask] = garbage
    dirty.requires_grad_()
    value = masked(loss, dirty, dirty_teacher, mask)
    slope = grad(value, dirty)[0]
    assert torch.equal(value, clean)
    assert torch.equal(slope, clean_grad)
    assert not slope[~mask].any()


@every_loss
def test_a_batch_without_valid_positions_gives_zero_loss_and_zero_gradients(loss):
    student, teacher = loss.sample(4, 5)
    student = (student * float("nan")).detach().requires_grad_()
    for empty in (
        masked(loss, student, teacher, torch.zeros(4, dtype=torch.bool)),
        masked(loss, student[:0], teacher[:0]),
        masked(loss, student, teacher, torch.zeros(4, dtype=torch.bool), num_items_in_batch=torch.tensor(0)),
        masked(loss, student[:0], teacher[:0], num_items_in_batch=torch.tensor(0)),
    ):
        assert empty == 0
        assert torch.equal(grad(empty, student)[0], torch.zeros_like(student))


@not_exempt(of=DISTANCES)
@pytest.mark.parametrize("shape", [(0, 6, 12), (0, 12), (0, 12, 2, 3)], ids=["tokens", "vectors", "maps"])
def test_an_empty_batch_gives_zero_with_a_graph_for_labels_of_any_shape(loss, shape):
    """Labels are at the features' positions, one per example, at other positions, or absent."""
    for label_shape in ((0, 6), (0, 2, 3), (0,), (0, 5), None):
        for reduction in ("mean", "sum", "none"):
            student, teacher = kdloss.Captured(), kdloss.Captured()
            student.features[0] = features = torch.zeros(shape, requires_grad=True)
            teacher.features[0] = torch.zeros(shape)
            term = kdloss.Features(pairing=[(0, 0)], depths=(1, 1), distance=partial(loss.function, **loss.settings))
            classes = None if label_shape is None else torch.zeros(label_shape, dtype=torch.long)
            value = kdloss.Sum(term, reduction=reduction)(student, teacher, classes)
            assert not value.any()
            assert grad(value, features)[0].shape == shape


def test_one_feature_vector_per_example_counts_once_for_every_labelled_token():
    student, teacher = kdloss.Captured(), kdloss.Captured()
    student.features[0], teacher.features[0] = torch.randn(3, 8), torch.randn(3, 8)
    labels = torch.tensor([[1, 2, -100, 0], [1, -100, -100, -100], [-100] * 4])
    each = (student.features[0] - teacher.features[0]).square().mean(-1)
    value = kdloss.Sum(kdloss.Features(pairing=[(0, 0)], depths=(1, 1)))(student, teacher, labels)
    torch.testing.assert_close(value, (3 * each[0] + each[1]) / 4)


RELATIONAL = [loss for loss in LOSSES if "relational" in loss.exempt]
every_relational_distance = pytest.mark.parametrize("loss", [x for x in RELATIONAL if x.kind == "distance"], ids=str)


@pytest.mark.parametrize("loss", [x for x in RELATIONAL if "place" not in x.exempt], ids=str)
def test_a_relational_loss_with_a_mask_equals_that_of_the_valid_positions(loss):
    student, teacher = loss.sample(7, 9, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True, True])
    value = masked(loss, student, teacher, mask)
    s, t = student.detach().numpy()[mask], teacher.numpy()[mask]
    assert value.item() == pytest.approx(loss.expected(s, t).mean(), rel=1e-9)
    exact = oracles.gradient(lambda x: loss.expected(x, t) / 5, s)
    slope = grad(value, student)[0]
    np.testing.assert_allclose(slope[mask], exact, rtol=1e-9, atol=1e-12)
    assert not slope[~mask].any()
    if loss.kind == "divergence" and "gamma" not in loss.settings:
        for alpha, labels in ((0.0, None), (0.5, torch.tensor([1, -100, 2, 3, -100, 1, 2]))):
            criterion = kdloss.VanillaKD(loss.settings["temperature"], alpha, divergence=loss.function)
            criterion(student, teacher, labels, mask=mask)
            assert criterion.components["kd"].item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [x for x in RELATIONAL if x.kind == "distance" and "batch" not in x.exempt], ids=str)
def test_relational_distances_compare_positions_within_each_example(loss):
    """So examples can be split into micro-batches and padded to any length."""
    student, teacher = loss.sample(3, 8, 5, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([[8], [4], [6]])
    full = masked(loss, student, teacher, mask, reduction="none")
    separate = [loss.call(student[b, :n], teacher[b, :n]) for b, n in enumerate([8, 4, 6])]
    torch.testing.assert_close(full[mask], torch.cat(separate))
    micro_batches = [
        masked(loss, student[cut], teacher[cut], mask[cut], num_items_in_batch=18) for cut in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(micro_batches), full.sum() / 18)
    torch.testing.assert_close(grad(sum(micro_batches), student), grad(full.sum() / 18, student))


@every_relational_distance
def test_a_single_valid_position_has_a_finite_value_and_gradient(loss):
    student, teacher = loss.sample(2, 4, 5)
    mask = torch.tensor([[False, True, False, False], [False] * 4])
    value = masked(loss, student, teacher, mask)
    assert value.isfinite()
    assert grad(value, student)[0].isfinite().all()


@every_relational_distance
def test_maps_float_masks_and_single_positions_are_refused_with_a_solution(loss):
    with pytest.raises(ValueError, match=r"kdloss\.distances\.tokens"):
        loss.call(torch.zeros(2, 5, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        loss.call(torch.zeros(4, 5), torch.zeros(4, 5), mask=torch.ones(4))
    if "alone" not in loss.exempt:
        with pytest.raises(ValueError, match="between_tokens"):
            loss.call(torch.zeros(1, 5), torch.zeros(1, 5))


@every_relational_distance
def test_different_widths_work_where_relations_are_compared_and_are_refused_elsewhere(loss):
    student, teacher = loss.sample(2, 6, 5, dtype=torch.float64)
    wider = torch.cat([teacher, torch.zeros(2, 6, loss.width(3), dtype=torch.float64)], -1)
    if "width" in loss.exempt:
        value = loss.call(student, wider)
        assert value.shape == (2, 6)
        assert grad(value, student)[0].abs().max() > 0
    else:
        with pytest.raises(ValueError, match=r"\(2, 6, 8\)"):
            loss.call(student, wider)
    with pytest.raises(ValueError, match=rf"\(2, 5, {loss.width(5)}\)"):
        loss.call(student, teacher[:, :5])


@not_exempt("relational", of=AT_ONE_TEMPERATURE)
def test_micro_batches_of_unequal_size_add_up_to_one_batch(loss):
    student, teacher = loss.sample(6, 5, dtype=torch.float64)
    mask = torch.tensor([True, True, True, False, True, True])
    full = masked(loss, student, teacher, mask)
    labels = labels_for(student.shape)
    micro_batches = [
        kdloss.masked(
            partial(loss.function, **loss.settings, **({"labels": labels[cut]} if loss.labelled else {})),
            student[cut],
            teacher[cut],
            mask[cut],
            num_items_in_batch=mask.sum(),
        )
        for cut in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(micro_batches), full, rtol=1e-12, atol=1e-12)
    slope = grad(sum(micro_batches), student)
    torch.testing.assert_close(slope, grad(full, student), rtol=1e-12, atol=1e-12)
    from_int = masked(loss, student, teacher, mask, num_items_in_batch=5)
    torch.testing.assert_close(grad(from_int, student), slope)


@every_loss
def test_a_loss_with_a_mask_compiles_without_a_graph_break(loss):
    student, teacher = loss.sample(3, 4, 5)
    mask = torch.rand(3, 4) > 0.4
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t, m: masked(loss, s, t, m), fullgraph=True, backend="aot_eager")
    plain, value = masked(loss, student, teacher, mask), compiled(student, teacher, mask)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(grad(value, student), grad(plain, student))


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(loss, dtype):
    student, teacher = loss.sample(3, 4, 5)
    value = loss.call(student, teacher)
    with torch.autocast("cpu", dtype):
        cast = loss.call(student, teacher)
    assert torch.equal(cast, value)
    assert torch.equal(grad(cast, student)[0], grad(value, student)[0])


@since_torch(2, 6)  # checkpoints of earlier versions do not support the meta device
@every_loss
def test_meta_tensors_give_a_meta_scalar(loss):
    student = torch.empty(3, 4, loss.width(5), device="meta", requires_grad=True)
    mask = torch.empty(3, 4, device="meta", dtype=torch.bool)
    value = masked(loss, student, torch.empty_like(student), mask)
    assert value.is_meta
    assert value.shape == ()


# -- invalid input --


@not_exempt("vocabulary", "width", of=AT_ONE_TEMPERATURE)
@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (5,), (4, 5, 1), (1, 4, 5), (2, 5)])
def test_nothing_broadcasts(loss, shape):
    with pytest.raises(ValueError, match=r"\(4, 5\)|vocabulary"):
        loss.call(torch.zeros(4, 5), torch.zeros(shape))


@every_loss
def test_integers_and_other_devices_are_refused(loss):
    with pytest.raises(TypeError, match="floating point"):
        loss.call(torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="meta"):
        loss.call(torch.zeros(4, 5), torch.zeros(4, 5, device="meta"))


@every_loss
def test_dtypes_may_differ_and_are_computed_in_float32(loss):
    student, teacher = loss.sample(4, 5)
    rounded = teacher.bfloat16()
    torch.testing.assert_close(loss.call(student, rounded), loss.call(student, rounded.float()))


DTYPE_PAIRS = [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float64, torch.float32)]


@every_loss
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=["32-64", "16-64", "64-32"])
def test_if_one_side_is_float64_both_are_computed_in_float64(loss, dtypes):
    for call in (loss.call, partial(in_criterion, loss)):
        student, teacher = (x.detach().to(dtype) for x, dtype in zip(loss.sample(2, 5, 6), dtypes, strict=True))
        student, wide = student.requires_grad_(), student.double().requires_grad_()
        mixed, exact = call(student, teacher), call(wide, teacher.double())
        assert mixed.dtype == torch.float64
        torch.testing.assert_close(mixed, exact, rtol=1e-12, atol=1e-12)
        slope, expected = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((mixed, student), (exact, wide)))
        assert slope.dtype == dtypes[0]
        torch.testing.assert_close(
            slope, expected.to(dtypes[0]), rtol=1e-2 if dtypes[0] == torch.bfloat16 else 1e-6, atol=1e-9
        )


def in_criterion(loss, student, teacher):
    """Compute a divergence inside a criterion, and a distance directly."""
    if loss.kind != "divergence":
        return loss.call(student, teacher)
    settings = dict(loss.settings)
    temperature, labels = settings.pop("temperature"), labels_for(student.shape)
    return kdloss.VanillaKD(temperature, 0.0, divergence=partial(loss.function, **settings))(student, teacher, labels)


@pytest.mark.parametrize("reduction", ["batchmean", "avg", None, "Mean"])
def test_an_unknown_reduction_is_refused_with_the_valid_names(reduction):
    for call in (
        lambda: kdloss.reduce(torch.zeros(3), reduction=reduction),
        lambda: kdloss.VanillaKD(reduction=reduction),
        lambda: kdloss.FeatureKD(reduction=reduction),
    ):
        with pytest.raises(ValueError, match=r"'mean', 'sum', 'none'"):
            call()


def test_invalid_masks_and_num_items_in_batch_are_refused():
    student, teacher = sample(3, 4, 5)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        kdloss.masked(kdloss.distances.mse, student, teacher, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        kdloss.masked(kdloss.distances.mse, student, teacher, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_items_in_batch"):
        kdloss.masked(kdloss.distances.mse, student, teacher, reduction="sum", num_items_in_batch=3)
    with pytest.raises(ValueError, match="positive"):
        kdloss.masked(kdloss.distances.mse, student, teacher, num_items_in_batch=0)


TAILS = pytest.mark.parametrize("tail", ["bucket", "renormalise", "uniform"])


def all_classes(teacher, temperature, tail):
    """A top-k teacher that keeps all classes, in an order of its own at each position."""
    order = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(2)).argsort(-1)
    log_probs = (teacher / temperature).log_softmax(-1).gather(-1, order)
    return kdloss.TopKLogits(order, log_probs, tail, temperature)


@pytest.mark.parametrize("loss", DIVERGENCES, ids=str)
@TAILS
def test_a_top_k_teacher_of_all_classes_in_any_order_equals_the_dense_one_or_is_refused(loss, tail):
    student, teacher = loss.sample(5, 9, dtype=torch.float64)
    kept = all_classes(teacher, loss.settings["temperature"], tail)
    if not loss.takes_top_k(tail):
        with pytest.raises(ValueError, match=r"top-k logits (hold|are)"):
            loss.call(student, kept)
        return
    value = loss.call(student, kept)
    s, t = student.detach().numpy(), teacher.numpy()
    np.testing.assert_allclose(value.detach(), loss.expected(s, t), rtol=1e-9, atol=1e-9)
    slope = loss.slope(s, t)
    np.testing.assert_allclose(grad(value, student)[0], slope, rtol=0, atol=1e-8 * max(1.0, abs(slope).max()))


@TAILS
@pytest.mark.parametrize("name", ["dist", "hard_labels", "uld", "sinkhorn"])
def test_a_standardized_divergence_takes_the_top_k_teachers_of_the_divergence_inside(name, tail):
    loss = next(x for x in ONE_EACH if x.name.startswith(name))
    student, teacher = loss.sample(5, 9, dtype=torch.float64)
    settings = dict(loss.settings)
    at = {"temperature": settings.pop("temperature")}
    divergence = kdloss.divergences.standardized(partial(loss.function, **settings))
    kept = all_classes(teacher, at["temperature"], tail)
    if not loss.takes_top_k(tail):
        with pytest.raises(ValueError, match="top-k logits hold"):
            divergence(student, kept, **at)
    else:
        torch.testing.assert_close(divergence(student, kept, **at), divergence(student, teacher, **at))


def test_a_divergence_of_ones_own_that_compares_positions_takes_only_top_k_teachers_with_every_class_in_its_place():
    def of_means(student, teacher, *, mask=None, temperature=1.0):
        q, p = ((x / temperature).softmax(-1).flatten(0, -2).mean(0) for x in (student, teacher))
        return (q - p).abs().sum().expand(student.shape[:-1])

    student, teacher = sample(5, 9, dtype=torch.float64)
    criterion = kdloss.VanillaKD(2.0, 0.0, divergence=of_means)
    exact = of_means(student, teacher, temperature=2.0).mean()
    torch.testing.assert_close(criterion(student, all_classes(teacher, 2.0, "uniform")), exact)
    for tail in ("bucket", "renormalise"):
        with pytest.raises(ValueError, match=r"of_means looks up.*tail='uniform'"):
            criterion(student, all_classes(teacher, 2.0, tail))


def test_a_standardized_divergence_of_any_two_vocabularies_stays_one():
    (student, _), (_, teacher) = sample(4, 7, dtype=torch.float64), sample(4, 5, dtype=torch.float64)
    value = kdloss.Sum(kdloss.Logits(kdloss.divergences.standardized(kdloss.divergences.uld)))(student, teacher)
    z, t = ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (student, teacher))
    torch.testing.assert_close(value, kdloss.divergences.uld(z, t).mean())


def test_a_standardized_divergence_of_your_own_still_needs_one_vocabulary():
    def squares(student, teacher, *, temperature=1.0):
        return student.square().sum(-1) - teacher.square().sum(-1)

    (student, _), (_, teacher) = sample(4, 7), sample(4, 5)
    with pytest.raises(ValueError, match=r"7.*5"):
        kdloss.Sum(kdloss.Logits(kdloss.divergences.standardized(squares)))(student, teacher)


def test_uld_refuses_top_k_teachers_whatever_their_vocabulary():
    (student, _), (_, teacher) = sample(4, 40), sample(4, 30)
    for kept in (all_classes(teacher, 1.0, "uniform"), kdloss.TopKLogits.of(teacher, 30)):
        with pytest.raises(ValueError, match=r"uld sorts the probabilities of all classes.*give all of the teacher's"):
            kdloss.VanillaKD(divergence=kdloss.divergences.uld)(student, kept, torch.zeros(4).long())
