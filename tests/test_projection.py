"""Projections from one width to another, and resizing from one grid of positions to another."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdloss


@pytest.mark.parametrize("build", [kdloss.projections.linear, kdloss.projections.conv1x1])
@pytest.mark.parametrize(("student", "teacher"), [(4, 6), (6, 4), (5, 5)])
def test_orthogonal_initial_weights_preserve_lengths_as_far_as_the_widths_allow(build, student, teacher):
    module = build(student, teacher, orthogonal=True)
    weight = module.weight.detach().flatten(1).double().numpy()
    small = weight.T @ weight if student <= teacher else weight @ weight.T
    np.testing.assert_allclose(small, np.eye(min(student, teacher)), atol=1e-6)
    assert not module.bias.any()
    plain = build(student, teacher).weight.flatten(1).detach().double().numpy()
    assert abs(plain.T @ plain - np.eye(student)).max() > 0.1


@pytest.mark.parametrize("build", [kdloss.projections.linear, kdloss.projections.conv1x1])
def test_frozen_projections_are_saved_but_never_trained(build):
    module = build(4, 6, orthogonal=True, frozen=True)
    assert not any(p.requires_grad for p in module.parameters())
    assert sorted(module.state_dict()) == ["bias", "weight"]
    assert all(p.requires_grad for p in build(4, 6).parameters())


def test_the_hidden_width_of_an_mlp_can_be_set():
    shapes = [tuple(p.shape) for p in kdloss.projections.mlp(4, 6, hidden=9).parameters()]
    assert shapes == [(9, 4), (9,), (6, 9), (6,)]
    assert [tuple(p.shape) for p in kdloss.projections.mlp(4, 6).parameters()] == [
        (6, 4),
        (6,),
        (6, 6),
        (6,),
    ]


def test_pooling_averages_the_finer_side_in_each_direction():
    student, teacher = torch.randn(2, 3, 4, 2), torch.randn(2, 5, 2, 4)
    s, t = kdloss.resize.pool(student, teacher)
    assert s.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(s, student.numpy().reshape(2, 3, 2, 2, 2).mean(3), rtol=1e-6)
    np.testing.assert_allclose(t, teacher.numpy().reshape(2, 5, 2, 2, 2).mean(4), rtol=1e-6)


def test_tokens_of_a_grid_are_pooled_like_maps_and_class_tokens_stay_in_front():
    student, teacher = torch.randn(2, 1 + 4, 3), torch.randn(2, 2 + 16, 5)
    s, t = kdloss.resize.pool(student, teacher, prefix=(1, 2), size=((2, 2), (4, 4)))
    assert torch.equal(s, student)
    assert torch.equal(t[:, 0], teacher[:, 0])
    blocks = teacher[:, 2:].numpy().reshape(2, 2, 2, 2, 2, 5).mean((2, 4)).reshape(2, 4, 5)
    np.testing.assert_allclose(t[:, 1:], blocks, rtol=1e-5, atol=1e-6)
    s, t = kdloss.resize.pool(student[:, 1:], teacher, prefix=(0, 2), size=((2, -1), (-1, 4)))
    assert s.shape == (2, 4, 3)
    np.testing.assert_allclose(t, blocks, rtol=1e-5, atol=1e-6)


def test_a_map_is_matched_with_the_tokens_of_a_transformer():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 1 + 16, 5)
    s, t = kdloss.resize.pool(student, teacher, prefix=(0, 1))
    assert torch.equal(s, student.flatten(2).mT)
    assert torch.equal(t, teacher[:, 1:])


def test_interpolation_resizes_the_student_to_the_teachers_positions():
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 4, 4)
    s, t = kdloss.resize.interpolate(student, teacher)
    # bilinear between pixel centres: output pixel 1 of 4 lies at 0.25 of the way from centre 0 to 1
    corner = student[..., 0, 0]
    assert torch.equal(s[..., 0, 0], corner)
    mixed = 0.75 * (0.75 * corner + 0.25 * student[..., 0, 1])
    mixed = mixed + 0.25 * (0.75 * student[..., 1, 0] + 0.25 * student[..., 1, 1])
    torch.testing.assert_close(s[..., 1, 1], mixed)
    assert t is teacher
    down, _ = kdloss.resize.interpolate(teacher, student)
    assert down.shape == (2, 5, 2, 2)


@pytest.mark.parametrize("resize", [kdloss.resize.pool, kdloss.resize.interpolate])
def test_features_at_equal_positions_are_unchanged_and_gradients_pass(resize):
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    s, t = resize(student, teacher)
    torch.testing.assert_close(s, student, rtol=1e-6, atol=0)
    torch.testing.assert_close(t, teacher, rtol=1e-6, atol=0)
    s.sum().backward()
    torch.testing.assert_close(student.grad, torch.ones_like(student))
    half, _ = resize(student.half(), teacher.half())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("resize", [kdloss.resize.pool, kdloss.resize.interpolate])
def test_tokens_without_a_stated_grid_are_refused_even_if_their_number_is_a_square(resize):
    for teacher in (torch.zeros(2, 64, 3), torch.zeros(2, 3, 4, 9)):
        with pytest.raises(ValueError, match=r"student.*16 positions behind prefix=0.*partial\(.*size=\(H, W\)\)"):
            resize(torch.zeros(2, 16, 3), teacher)
    with pytest.raises(
        ValueError, match=r"teacher.*63 positions behind prefix=1, which don't fit a grid of size=\(8, 8\)"
    ):
        resize(torch.zeros(2, 3, 4, 9), torch.zeros(2, 64, 3), prefix=(0, 1), size=(8, 8))
    with pytest.raises(ValueError, match=r"student.*36 positions, which don't fit a grid of size=\(6, 6\)"):
        resize(torch.zeros(2, 3, 4, 9), torch.zeros(2, 64, 3), size=((6, 6), (8, 8)))
    with pytest.raises(ValueError, match="of different kinds"):
        resize(torch.zeros(2, 3, 4, 9), torch.zeros(2, 3, 4, 9, 2))
    with pytest.raises(ValueError, match="neither maps"):
        resize(torch.zeros(2, 16), torch.zeros(2, 16))


def test_tokens_of_a_rectangle_a_sequence_and_a_volume_are_pooled_like_maps_of_that_shape():
    for size, coarse in (((4, 9), (2, 3)), ((2, 4, 9), (2, 2, 3)), ((12,), (4,))):
        maps = torch.randn(2, 3, *size)
        blocks = maps
        for axis, (n, m) in enumerate(zip(size, coarse, strict=True)):
            blocks = blocks.unflatten(2 + axis, (m, n // m)).mean(3 + axis)
        other = torch.randn(2, 5, *coarse)
        s, t = kdloss.resize.pool(maps.flatten(2).mT, other.flatten(2).mT, size=(size, coarse))
        torch.testing.assert_close(s, blocks.flatten(2).mT)
        torch.testing.assert_close(t, other.flatten(2).mT)
        if len(size) > 1:
            s, t = kdloss.resize.pool(maps.flatten(2).mT, other, size=size)  # the map itself shows its grid
            torch.testing.assert_close(s, blocks.flatten(2).mT)
    long, short = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    s, _ = kdloss.resize.interpolate(short, long, size=(-1,))
    quarter = 0.75 * short[:, 0] + 0.25 * short[:, 1]
    torch.testing.assert_close(s[:, :2], torch.stack([short[:, 0], quarter], 1))


def test_a_linear_projection_of_positions_equals_the_1x1_convolution_of_a_map():
    features = torch.randn(2, 4, 3, 3)
    module = kdloss.projections.linear(4, 6)
    convolved = F.conv2d(features, module.weight[..., None, None], module.bias)
    torch.testing.assert_close(module(kdloss.distances.tokens(features)), kdloss.distances.tokens(convolved))


# -- projections and resizing in FeatureKD --


def captured(student, teacher):
    """Return what `capture` would have recorded for one pair of blocks."""
    seen = kdloss.Captured(), kdloss.Captured()
    seen[0].features[0], seen[1].features[0] = student, teacher
    return seen


def feature_kd(**settings):
    return kdloss.FeatureKD(pairing=[(0, 0)], alpha=0.0, depths=(1, 1), **settings)


def test_by_default_a_projection_is_built_only_for_unequal_widths_and_distances_that_need_equal_ones():
    cases = {
        kdloss.distances.mse: (1, 0),
        kdloss.distances.cka: (0, 0),
        partial(kdloss.distances.attention_transfer, paper=True): (0, 0),
        kdloss.distances.between_examples(partial(kdloss.distances.cka, unbiased=True), mean=True): (0, 0),
    }
    for distance, (unequal, equal) in cases.items():
        assert len(feature_kd(distance=distance, widths=(5, 6)).projections) == unequal
        assert len(feature_kd(distance=distance, widths=(5, 5)).projections) == equal
        criterion = feature_kd(distance=distance, widths=(5, 6))
        student = torch.randn(4, 7, 5, requires_grad=True)
        criterion(*captured(student, torch.randn(4, 7, 6))).backward()
        assert student.grad.abs().max() > 0


@pytest.mark.parametrize("build", [kdloss.projections.linear, kdloss.projections.mlp])
def test_the_loss_is_that_of_the_projected_features_for_equal_and_unequal_widths(build):
    for widths in ((5, 6), (5, 5)):
        criterion = feature_kd(projection=build, widths=widths)
        student, teacher = torch.randn(3, 7, widths[0]), torch.randn(3, 7, widths[1])
        module = next(iter(criterion.projections.values()))
        arrays = [p.detach().double().numpy() for p in module.parameters()]
        x = student.double().numpy()
        x = x @ arrays[0].T + arrays[1]
        if len(arrays) == 4:
            gelu = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
            x = gelu @ arrays[2].T + arrays[3]
        expected = ((x - teacher.numpy()) ** 2).mean()
        assert criterion(*captured(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_a_convolution_gets_the_map_and_equals_a_linear_projection_of_its_positions():
    student, teacher = torch.randn(2, 5, 4, 3), torch.randn(2, 6, 4, 3)
    mask = torch.rand(2, 4, 3) > 0.3
    convolution, linear = (
        feature_kd(projection=p, widths=(5, 6)) for p in (kdloss.projections.conv1x1, kdloss.projections.linear)
    )
    weights = convolution.projections["0"].weight, convolution.projections["0"].bias
    linear.projections["0"].load_state_dict({"weight": weights[0].detach()[..., 0, 0], "bias": weights[1]})
    student = torch.where(mask[:, None], student, torch.nan)
    losses = [c(*captured(student, teacher), feature_mask=mask) for c in (convolution, linear)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(weights[0].grad[..., 0, 0], linear.projections["0"].weight.grad)
    with pytest.raises(ValueError, match=r"\(2, 12, 5\); write projection=kdloss\.projections\.linear"):
        convolution(*captured(torch.zeros(2, 12, 5), torch.zeros(2, 12, 6)))


def test_any_module_on_maps_can_be_the_projection():
    norm = partial(torch.nn.Conv2d, kernel_size=3, padding=1)
    criterion = feature_kd(
        projection=lambda s, t: torch.nn.Sequential(norm(s, t), torch.nn.BatchNorm2d(t)), widths=(5, 6)
    )
    criterion(*captured(torch.randn(2, 5, 4, 4), torch.randn(2, 6, 4, 4))).backward()
    assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_the_teacher_can_be_projected_by_orthonormal_rows_that_are_not_trained():
    criterion = feature_kd(project="teacher", widths=(5, 8))
    weight = criterion.projections["0"].weight
    np.testing.assert_allclose((weight @ weight.T).detach(), np.eye(5), atol=1e-6)
    assert not weight.requires_grad
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 8)
    expected = (student - teacher @ weight.T).square().mean()
    loss = criterion(*captured(student, teacher))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
    mlp = feature_kd(project="teacher", projection=kdloss.projections.mlp, widths=(5, 8))
    assert not any(p.requires_grad for p in mlp.parameters())
    assert mlp.projections["0"][0].in_features == 8


def test_one_projection_can_be_shared_by_all_pairs_and_is_saved_once():
    criterion = kdloss.FeatureKD([0, 1], depths=(2, 2), widths=(5, 6), shared=True, alpha=0.0)
    assert sorted(criterion.state_dict()) == [f"terms.feature.projections.shared.{part}" for part in ("bias", "weight")]
    separate = kdloss.FeatureKD([0, 1], depths=(2, 2), widths=(5, 6), alpha=0.0)
    for projection in separate.projections.values():
        projection.load_state_dict(criterion.projections["shared"].state_dict())
    seen = kdloss.Captured(), kdloss.Captured()
    for block in (0, 1):
        seen[0].features[block], seen[1].features[block] = torch.randn(3, 5), torch.randn(3, 6)
    criterion(*seen).backward()
    separate(*seen).backward()
    gradients = [p.weight.grad for p in separate.projections.values()]
    torch.testing.assert_close(criterion.projections["shared"].weight.grad, gradients[0] + gradients[1])
    with pytest.raises(ValueError, match="shared=True"):
        kdloss.FeatureKD([0, 1], depths=(2, 2), widths=[(5, 6), (7, 6)], shared=True)


def test_a_trained_projection_is_reused_if_the_widths_fit_and_never_replaced_if_they_do_not():
    cases = ({}, {"shared": True}, {"project": "teacher"}, {"distance": Scaled})
    for settings in cases:
        criterion = feature_kd(widths=(5, 6), **settings)
        before = list(criterion.parameters())
        criterion.terms["feature"].build({(0, 0): (5, 6)})
        for other in ((5, 7), (7, 6), (6, 6), (6, 5)):
            with pytest.raises(
                ValueError, match=rf"widths \(5, 6\).*now come \({other[0]}, {other[1]}\).*a criterion for"
            ):
                criterion.terms["feature"].build({(0, 0): other})
        assert all(a is b for a, b in zip(before, criterion.parameters(), strict=True))
    criterion = feature_kd(widths=(5, 5))  # no projection was built, so none is lost
    criterion.terms["feature"].build({(0, 0): (7, 7)})
    assert not criterion.projections
    criterion.terms["feature"].build({(0, 0): (5, 7)})
    assert next(iter(criterion.projections.values())).in_features == 5


class Tiny(torch.nn.Module):
    """A model of one block, whose features may have another width than its configuration says."""

    def __init__(self, width, says=None):
        super().__init__()
        self.config = None if says is None else type("Config", (), {"hidden_size": says})
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, width)])

    def forward(self, x):
        return self.layers[0](x)


BATCH = torch.zeros(2, 4)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("module", [kdloss.Distiller, kdloss.Distillation])
def test_projections_of_one_student_are_never_replaced_by_those_of_another(measured, module):
    def prepared(criterion, student, teacher):
        runner = module(teacher, criterion) if module is kdloss.Distiller else module(student, teacher, criterion)
        if module is kdloss.Distiller:
            return runner.prepare(student, *([BATCH] if measured else []))
        return runner.prepare(BATCH) if measured else runner

    criterion = kdloss.FeatureKD("all", alpha=0.0)
    first, teacher = Tiny(5, 5), Tiny(6, 6)
    prepared(criterion, first, teacher)
    before = list(criterion.parameters())
    with torch.no_grad():
        before[0].fill_(7)
    for student in (first, Tiny(5, 5)):  # the same student again, or another of equal widths
        prepared(criterion, student, teacher)
    for student, other in ((Tiny(8, 8), teacher), (Tiny(6, 6), teacher), (first, Tiny(9, 9))):
        with pytest.raises(ValueError, match=r"student layer 0.*widths \(5, 6\).*Write a criterion for each"):
            prepared(criterion, student, other)
    assert all(a is b for a, b in zip(before, criterion.parameters(), strict=True))
    assert (before[0] == 7).all()


def test_widths_from_a_batch_or_an_argument_take_precedence_over_the_configuration():
    teacher, student = Tiny(6, 6), Tiny(5, 3)
    criterion = kdloss.FeatureKD("all", alpha=0.0)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    assert criterion.projections["0"].in_features == 3
    distill.prepare(student, BATCH)
    assert criterion.projections["0"].in_features == 5
    learned = criterion.projections["0"]
    distill.prepare(student, BATCH).prepare(student)
    assert criterion.projections["0"] is learned
    configured = kdloss.FeatureKD("all", alpha=0.0, depths=(1, 1), widths=(5, 6))
    assert kdloss.Distiller(teacher, configured).prepare(student).criterion.projections["0"].in_features == 5
    with pytest.raises(ValueError, match=r"now come \(4, 6\)"):
        kdloss.Distiller(teacher, configured).prepare(Tiny(4), BATCH)


class Scaled(torch.nn.Module):
    """A distance with a parameter for each of the teacher's channels."""

    def __init__(self, student_width, teacher_width, power=2.0):
        super().__init__()
        self.widths, self.power = (student_width, teacher_width), power
        self.scale = torch.nn.Parameter(torch.ones(teacher_width))

    def forward(self, student, teacher):
        return ((student - teacher.detach()).abs() ** self.power * self.scale).mean(-1)


def test_a_distance_class_is_instantiated_for_every_student_layer_and_trained_and_saved():
    criterion = kdloss.FeatureKD([0, 1], depths=(2, 2), widths=(5, 6), distance=partial(Scaled, power=4.0), alpha=0.0)
    assert [(d.widths, d.power) for d in criterion.terms["feature"].distances.values()] == [((6, 6), 4.0)] * 2
    names = [f"terms.feature.distances.{i}.scale" for i in (0, 1)]
    assert sorted(criterion.state_dict())[:2] == names
    seen = kdloss.Captured(), kdloss.Captured()
    for block in (0, 1):
        seen[0].features[block], seen[1].features[block] = torch.randn(3, 5), torch.randn(3, 6)
    criterion(*seen).backward()
    assert all(p.grad.abs().max() > 0 for p in criterion.parameters())
    assert (
        criterion.terms["feature"].distances["0"].scale.grad.tolist()
        != criterion.terms["feature"].distances["1"].scale.grad.tolist()
    )
    assert [d.widths for d in feature_kd(distance=Scaled, widths=(5, 5)).terms["feature"].distances.values()] == [
        (5, 5)
    ]
    with pytest.raises(ValueError, match=r"not been built.*model\.prepare\(\*\*batch\)"):
        feature_kd(distance=Scaled)(*captured(torch.randn(3, 5), torch.randn(3, 5)))


def test_copies_pickles_and_state_dicts_contain_projections_and_distances():
    criterion = feature_kd(distance=Scaled, projection=kdloss.projections.mlp, widths=(5, 6))
    seen = captured(torch.randn(3, 5), torch.randn(3, 6))
    other = feature_kd(distance=Scaled, projection=kdloss.projections.mlp, widths=(5, 6))
    other.load_state_dict(criterion.state_dict())
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), other):
        torch.testing.assert_close(again(*seen), criterion(*seen))
        with torch.no_grad():
            again.terms["feature"].distances["0"].scale.zero_()
        assert again(*seen) == 0
        assert criterion(*seen) > 0
        with pytest.raises(ValueError, match=r"widths \(5, 6\)"):
            again.terms["feature"].build({(0, 0): (5, 9)})


def test_maps_and_patches_of_other_sizes_are_refused_unless_resize_is_set():
    student, teacher = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 8, 8)
    with pytest.raises(ValueError, match=r"resize=kdloss\.resize\.pool"):
        feature_kd()(*captured(student, teacher))
    loss = feature_kd(resize=kdloss.resize.pool)(*captured(student, teacher))
    pooled = teacher.numpy().reshape(2, 5, 4, 2, 4, 2).mean((3, 5))
    assert loss.item() == pytest.approx(((student.numpy() - pooled) ** 2).mean(), rel=1e-5)
    patches = torch.randn(2, 1 + 16, 5)
    resize = partial(kdloss.resize.pool, prefix=(0, 1))
    loss = feature_kd(resize=resize)(*captured(student, patches))
    rows = student.flatten(2).mT
    assert loss.item() == pytest.approx((rows - patches[:, 1:]).square().mean().item(), rel=1e-5)


def test_relations_of_a_map_are_computed_from_the_counted_positions_only():
    student, teacher = torch.randn(2, 5, 4, 3), torch.randn(2, 6, 4, 3)
    mask = torch.rand(2, 4, 3) > 0.3
    value = feature_kd(distance=kdloss.distances.similarity)(*captured(student, teacher), feature_mask=mask)
    expected = []
    for b in range(2):
        positions = [x[b].permute(1, 2, 0)[mask[b]] for x in (student, teacher)]
        expected.append(kdloss.distances.similarity(*positions).mean())
    torch.testing.assert_close(value, torch.stack(expected).mean())


def test_relations_between_tokens_exclude_positions_without_labels():
    student, teacher = torch.randn(3, 6, 5), torch.randn(3, 6, 8)
    labels = torch.randint(0, 4, (3, 6))
    labels[0, 3:] = -100
    criterion = feature_kd(distance=kdloss.distances.between_tokens(kdloss.distances.cka), causal=True)
    value = criterion(*captured(student, teacher), labels)
    keep = labels[:, 1:] != -100
    expected = kdloss.distances.cka(student[:, :-1][keep], teacher[:, :-1][keep]).mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"projection": torch.nn.Linear(5, 6)}, TypeError, "projection=lambda student, teacher: module"),
        ({"projection": "linear"}, TypeError, r"projection=kdloss\.projections\.linear"),
        ({"project": "both"}, ValueError, r"\['student', 'teacher'\]"),
        ({"resize": "pool"}, TypeError, r"resize=kdloss\.resize\.pool"),
    ],
)
def test_invalid_settings_are_refused_at_construction(settings, error, match):
    with pytest.raises(error, match=match):
        feature_kd(**settings)
