"""Single distances beyond the laws: published formulas, numbers worked out by hand, memory, `between_...`."""

from functools import partial

import numpy as np
import oracles
import pytest
import torch
from losses import sample
from parts.memory import training_memory

import kdloss
from kdloss.distances import _relations
from kdloss.distances._rows import needs_no_width
from kdloss.reduction import fill

f64 = partial(sample, dtype=torch.float64)


def numbers(*tensors):
    return [x.detach().numpy() for x in tensors]


def grad(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs)


def gaps(x):
    """Vectors from every row (first index) to every row."""
    return x[None, :] - x[:, None]


def units(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)


def huber(x):
    return np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5)


# -- the formulas as published: one sum or mean over all rows --


def rkd_distance_as_published(s, t):
    d, e = (np.linalg.norm(gaps(x), axis=-1) for x in (s, t))
    return huber(d / d[d > 0].mean() - e / e[e > 0].mean()).mean()


def rkd_angle_as_published(s, t):
    a, b = (np.einsum("ijd,ikd->ijk", *[units(gaps(x))] * 2) for x in (s, t))
    return huber(a - b).mean()


def pkt_as_published(s, t, eps=1e-7):
    q, p = ((units(x) @ units(x).T + 1) / 2 for x in (s, t))
    q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
    return (p * np.log((p + eps) / (q + eps))).mean()


def nst_as_published(s, t):
    f, g = units(s.T), units(t.T)
    return ((f @ f.T) ** 2).mean() + ((g @ g.T) ** 2).mean() - 2 * ((f @ g.T) ** 2).mean()


def cc_as_published(s, t):
    c, d = (units(x) @ units(x).T for x in (s, t))
    taylor = [np.exp(-0.8) * (1 + 0.8 * x + 0.32 * x**2) for x in (c, d)]
    return ((taylor[0] - taylor[1]) ** 2).sum() / len(s) ** 2


def cwd_as_published(s, t):
    total, rows = 0.0, [np.exp(x / 4.0) / np.exp(x / 4.0).sum(0) for x in (s, t)]
    for c in range(s.shape[1]):
        total += 16 / s.shape[1] * (rows[1][:, c] * np.log(rows[1][:, c] / rows[0][:, c])).sum()
    return total


def fsp_as_published(s, t):
    g, h = (x[:, :3].T @ x[:, 3:] / len(x) for x in (s, t))
    return np.linalg.norm(g - h) ** 2


PUBLISHED = {
    kdloss.distances.rkd_distance: rkd_distance_as_published,
    kdloss.distances.rkd_angle: rkd_angle_as_published,
    kdloss.distances.pkt: pkt_as_published,
    kdloss.distances.nst: nst_as_published,
    kdloss.distances.correlation_congruence: cc_as_published,
    kdloss.distances.cwd: cwd_as_published,
    kdloss.distances.fsp: fsp_as_published,
}


@pytest.mark.parametrize("distance", PUBLISHED, ids=lambda x: x.__name__)
def test_the_mean_over_rows_is_the_published_loss(distance):
    student, teacher = f64(7, 6)
    expected = PUBLISHED[distance](*numbers(student, teacher))
    # the published PKT adds its epsilon, 1e-7, in another place
    tolerance = 1e-5 if distance is kdloss.distances.pkt else 1e-12
    assert distance(student, teacher).mean().item() == pytest.approx(expected, rel=tolerance)
    examples = [f64(7, 6, seed=seed) for seed in range(3)]
    batch = distance(*(torch.stack(side) for side in zip(*examples, strict=True)))
    expected = np.mean([PUBLISHED[distance](*numbers(*x)) for x in examples])
    assert batch.mean().item() == pytest.approx(expected, rel=tolerance)


# -- RKD --


def test_distances_of_near_duplicates_are_accurate():
    """In float32, the formula |a|² + |b|² - 2ab has no correct digit here."""
    base = torch.full((3, 4), 100.0)
    near = base + torch.tensor([0.0, 2**-13, 2**-12]).unsqueeze(-1)
    distances = _relations.pairwise_distances(near.unsqueeze(0))[0]
    step = 2.0**-12  # 2 · 2^-13: four equal gaps
    torch.testing.assert_close(distances, torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]]) * step, rtol=1e-6, atol=0)


def test_distances_of_wide_rows_are_accurate():
    """A sequential sum in float32 has a relative error of 1e-5 here."""
    rows = torch.randn(1, 8, 50_000) ** 4
    exact = np.linalg.norm(gaps(rows[0].double().numpy()), axis=-1)
    np.testing.assert_allclose(_relations.pairwise_distances(rows)[0], exact, rtol=1e-6)


def test_gradients_of_near_duplicates_among_distant_rows_are_accurate():
    """As a matrix product, row · (sum of weights) - weighted sum of rows, they have two correct digits here."""
    rows = 100 * torch.randn(1, 6, 5)
    rows[0, 1] = rows[0, 0] + 2.0**-10 * torch.randint(1, 9, (5,))
    rows.requires_grad_()
    weight = torch.rand(1, 6, 6, dtype=torch.float64)
    gradient = torch.autograd.grad((_relations.pairwise_distances(rows) * weight).sum(), rows)[0]
    symmetric = (weight + weight.mT).numpy()[0, :, :, None]
    exact = -(symmetric * units(gaps(rows.detach().double().numpy()[0]))).sum(1)
    np.testing.assert_allclose(gradient[0], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "distance", [kdloss.distances.rkd_distance, kdloss.distances.rkd_angle], ids=lambda x: x.__name__
)
def test_rkd_does_not_depend_on_shift_rotation_or_scale_of_either_side(distance):
    student, teacher = f64(6, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    value = distance(student, teacher)
    torch.testing.assert_close(distance(3 * student @ rotation + 5, teacher / 7 - 1), value)


def test_rkd_angle_of_a_right_triangle_is_the_value_worked_out_by_hand():
    """A 3-4-5 triangle and an equilateral one: cosines (0, 3/5, 4/5) and 1/2 each."""
    right = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    equilateral = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    by_hand = [2 * (c - 0.5) ** 2 / 2 / 9 for c in (0.0, 0.6, 0.8)]
    torch.testing.assert_close(
        kdloss.distances.rkd_angle(equilateral, right), torch.tensor(by_hand, dtype=torch.float64)
    )


def test_very_different_relations_are_in_the_linear_part_of_smooth_l1():
    """Distances (3, 0, 3) and (0, 3, 3), divided by their mean 2: a difference of 1.5 costs 1."""
    teacher = torch.tensor([[0.0], [0.0], [3.0]])
    student = torch.tensor([[0.0], [3.0], [3.0]])
    torch.testing.assert_close(kdloss.distances.rkd_distance(student, teacher), torch.tensor([1.0, 2.0, 1.0]) / 3)


RELATIONS = [
    kdloss.distances.rkd_distance,
    kdloss.distances.rkd_angle,
    partial(kdloss.distances.word_relation, window=5),
]


@pytest.mark.parametrize("distance", RELATIONS, ids=["distance", "angle", "words"])
def test_vertices_in_many_chunks_give_the_values_and_gradients_of_one_chunk(distance, monkeypatch):
    student, teacher = f64(2, 7, 3)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])

    def outcome(run):
        value = run(student, teacher, mask=mask)
        gradient = torch.autograd.grad(value.sum(), student, create_graph=True)[0]
        return value, gradient, torch.autograd.grad(gradient.square().sum(), student)[0]

    expected = outcome(distance)
    monkeypatch.setattr(_relations, "AT_A_TIME", 2 * 2 * 7 * 10)
    monkeypatch.setattr(_relations, "KEPT", 0)
    assert 1 < -(-7 // max(1, _relations.AT_A_TIME // (2 * 7 * 10))) < 7
    torch.testing.assert_close(outcome(distance), expected)
    torch._dynamo.reset()
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")(student, teacher, mask=mask)
    torch.testing.assert_close(compiled, expected[0])
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), student)[0], expected[1].detach())


@pytest.mark.parametrize(
    ("distance", "width"),
    [(kdloss.distances.rkd_distance, 512), (kdloss.distances.rkd_angle, 64)],
    ids=["distance", "angle"],
)
def test_memory_of_relations_is_far_below_one_tensor_of_all_differences_or_angles(distance, width):
    """A tensor of all differences has N² D floats, one of all angles N³."""
    n = 256
    student, teacher = sample(n, width)
    peak = training_memory(lambda: distance(student, teacher).sum().backward(), [student, teacher])
    assert peak < 4 * n * n * (n if distance is kdloss.distances.rkd_angle else width) / 8
    assert student.grad.abs().max() > 0


# -- word relations --


def test_word_relations_are_kl_of_pairs_and_squared_angles_in_the_window():
    student, teacher = f64(1, 9, 4)
    mask = (torch.arange(9) < 6).unsqueeze(0)
    value = kdloss.distances.word_relation(student, teacher, mask=mask, window=5, triple_weight=3.0)
    s, t = (x[0, :6] for x in numbers(student, teacher))
    n = 6
    q, p = (np.exp(units(x) @ units(x).T) * (1 - np.eye(n)) for x in (s, t))
    q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
    pairs = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(1) / n
    a, b = (np.einsum("ijd,ikd->ijk", *[units(gaps(x))] * 2) for x in (s, t))
    triples = [((a - b)[i, max(0, i - 2) : i + 3, max(0, i - 2) : i + 3] ** 2).mean() for i in range(n)]
    np.testing.assert_allclose(value[0, :6].detach(), pairs + 3 * np.array(triples), rtol=1e-12)
    assert not value[0, 6:].any()
    with pytest.raises(ValueError, match="odd number, got 4"):
        kdloss.distances.word_relation(student, teacher, window=4)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_a_sentence_of_one_word_costs_nothing_and_computes_no_nan():
    student, teacher = sample(64, 3, 5)
    mask = torch.tensor([True, False, False]).expand(64, 3)
    with torch.autograd.detect_anomaly(check_nan=True):
        value = kdloss.distances.word_relation(student, teacher, mask=mask)
        value.sum().backward()
    assert not value.any()
    assert not student.grad.any()


# -- other distributions over rows --


def test_pkt_of_opposite_rows_is_finite_where_rounding_puts_their_cosine_below_minus_one():
    row, teacher = sample(500, 1, 33)
    student = torch.cat([row, -row], 1)
    unit = torch.nn.functional.normalize(student, dim=-1)
    assert (unit @ unit.mT).min() < -1 - 2e-7
    value = kdloss.distances.pkt(student, torch.cat([teacher, teacher], 1))
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), row)[0].isfinite().all()


# -- distances of single positions --


def test_activation_boundary_penalises_the_wrong_side_of_zero_and_a_margin():
    teacher = torch.tensor([[3.0, -0.2, 0.0, 1e-9]])
    student = torch.tensor([[-1.0, -2.0, 0.5, 1.5]], requires_grad=True)
    value = kdloss.distances.activation_boundary(student, teacher)
    assert value.item() == pytest.approx((2.0**2 + 0 + 1.5**2 + 0) / 4)
    gradient = torch.autograd.grad(value.sum(), student)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-4.0, 0.0, 3.0, 0.0]]) / 4)


def test_pkd_is_twice_cosine_and_does_not_depend_on_length():
    student, teacher = f64(5, 4)
    torch.testing.assert_close(
        kdloss.distances.pkd(3 * student, teacher / 9), 2 * kdloss.distances.cosine(student, teacher)
    )


def test_standardized_mse_divides_by_each_features_variance_over_all_counted_positions():
    student, teacher = f64(3, 4, 5)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    scale = torch.tensor([1.0, 1e4, 1e-1, 3.0, 50.0], dtype=torch.float64)
    value = kdloss.distances.standardized_mse(student, teacher, mask=mask, eps=0.0)
    torch.testing.assert_close(
        kdloss.distances.standardized_mse(student * scale, teacher * scale, mask=mask, eps=0.0), value
    )
    s, t = (x[mask.numpy()] for x in numbers(student, teacher))
    np.testing.assert_allclose(value[mask].detach(), ((s - t) ** 2 / t.var(0)).mean(1), rtol=1e-12)


def test_fsp_refuses_a_split_with_an_empty_side():
    for split in (0, 4, 9):
        with pytest.raises(ValueError, match=rf"split={split} of width 4; write torch\.cat"):
            kdloss.distances.fsp(torch.zeros(2, 4), torch.zeros(2, 4), split=split)


def test_cwd_at_an_impossible_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        kdloss.distances.cwd(torch.zeros(2, 4), torch.zeros(2, 4), temperature=0.0)


# -- feature maps: one position's channels are far from each other in memory --

between = kdloss.distances.between_examples
MAPS = [
    (kdloss.distances.mse, 2),
    (kdloss.distances.smooth_l1, 2),
    (kdloss.distances.attention_transfer, 3),
    (between(kdloss.distances.similarity), 1),
    (between(kdloss.distances.cka), 3),
    (between(kdloss.distances.rkd_distance), 1),
]
of_maps = pytest.mark.parametrize(
    ("distance", "copies"), MAPS, ids=["mse", "smooth_l1", "attention", "similarity", "cka", "distances"]
)


@of_maps
def test_maps_are_compared_without_transposed_or_masked_copies(distance, copies):
    """At most `copies` tensors of a map's size are allocated, the gradient included."""
    student, teacher = sample(4, 32, 16, 16)
    tokens = kdloss.distances.tokens
    held = [student, teacher]
    peak = training_memory(lambda: distance(tokens(student), tokens(teacher)).sum().backward(), held)
    assert peak < 4 * student.numel() * (2 + copies + 0.2)
    assert student.grad.is_contiguous()


@of_maps
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_maps_with_channels_first_or_last_in_memory_give_equal_values_and_gradients(distance, copies, masked):
    student, teacher = f64(4, 3, 5, 2)
    mask = torch.arange(10) % 4 != torch.arange(4).unsqueeze(1) if masked else None
    for x in student, student.contiguous(memory_format=torch.channels_last):
        for y in teacher, teacher.contiguous(memory_format=torch.channels_last):
            sides = kdloss.distances.tokens(x), kdloss.distances.tokens(y)
            value = kdloss.masked(distance, *sides, mask, reduction="none")
            rows = [z.detach().flatten(2).mT.contiguous() for z in (x, y)]
            expected = kdloss.masked(distance, rows[0].requires_grad_(), rows[1], mask, reduction="none")
            torch.testing.assert_close(value, expected)
            gradient, of_rows = grad(value, student)[0], grad(expected, rows[0])[0]
            torch.testing.assert_close(gradient.flatten(2).mT, of_rows)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=["map", "volume"])
def test_a_masked_map_has_the_memory_layout_of_the_map(shape):
    x = torch.randn(shape, requires_grad=True)
    last = x.movedim(1, -1)
    mask = torch.rand(last.shape[:-1]) > 0.4
    masked = fill(last, mask)
    assert torch.equal(masked, torch.where(mask.unsqueeze(-1), last, 0))
    assert masked.stride() == last.stride()
    gradient = torch.autograd.grad(masked.sum(), x)[0]
    assert torch.equal(gradient, mask.unsqueeze(1).float().expand(shape))
    assert gradient.is_contiguous()


# -- between_tokens and between_examples --

MASK = torch.arange(4) < torch.tensor([[4], [2], [3], [1]])


def test_between_tokens_compares_all_counted_positions_as_one_set():
    student, teacher = f64(4, 4, 5)
    value = kdloss.masked(
        kdloss.distances.between_tokens(kdloss.distances.similarity),
        student,
        teacher,
        MASK,
        reduction="none",
    )
    s, t = (x[MASK.numpy()] for x in numbers(student, teacher))
    np.testing.assert_allclose(value[MASK].detach(), oracles.similarity(s, t), rtol=1e-9)
    assert not value[~MASK].any()
    exact = oracles.gradient(lambda x: oracles.similarity(x, t), s)
    np.testing.assert_allclose(torch.autograd.grad(value.sum(), student)[0][MASK], exact, rtol=1e-9, atol=1e-12)


def test_between_examples_compares_masked_means_or_concatenated_positions():
    student, teacher = f64(4, 4, 5)
    for mean in (True, False):
        distance = kdloss.distances.between_examples(kdloss.distances.similarity, mean=mean)
        value = kdloss.masked(distance, student, teacher, MASK)
        sides = []
        for x in numbers(student, teacher):
            vectors = []
            for example, n in zip(x, (4, 2, 3, 1), strict=True):
                padded = np.concatenate([example[:n], np.zeros((4 - n, 5))])
                vectors.append(example[:n].mean(0) if mean else padded.ravel())
            sides.append(np.array(vectors))
        expected = oracles.similarity(*sides)
        assert value.item() == pytest.approx(np.average(expected, weights=[4, 2, 3, 1]), rel=1e-9)
        none = distance(student, teacher, mask=MASK)
        for b, n in enumerate((4, 2, 3, 1)):
            np.testing.assert_allclose(none[b, :n].detach(), expected[b], rtol=1e-9)
            assert not none[b, n:].any()


def test_an_example_without_a_counted_position_is_not_compared():
    student, teacher = f64(4, 3, 5)
    mask = torch.tensor([[True] * 3, [False] * 3, [True, True, False], [True] * 3])
    for mean in (True, False):
        distance = kdloss.distances.between_examples(kdloss.distances.rkd_distance, mean=mean)
        compared = torch.tensor([0, 2, 3])
        value = kdloss.masked(distance, student, teacher, mask)
        expected = kdloss.masked(distance, student[compared], teacher[compared], mask[compared])
        torch.testing.assert_close(value, expected)
        assert not torch.autograd.grad(value, student)[0][~mask].any()


def test_between_takes_partials_and_tells_whether_they_allow_any_width():
    student, wide = f64(3, 4, 5)[0], f64(3, 4, 8)[1]
    distance = partial(kdloss.distances.cka, unbiased=True)
    for between in (kdloss.distances.between_tokens, partial(kdloss.distances.between_examples, mean=True)):
        compared = between(partial(kdloss.distances.correlation_congruence, gamma=1.0))
        assert needs_no_width(compared)
        assert needs_no_width(partial(compared))
        assert compared(student, wide).shape == (3, 4)
        assert not needs_no_width(between(kdloss.distances.cwd))
    s, t = (x.reshape(12, -1) for x in numbers(student, wide))
    value = kdloss.distances.between_tokens(distance)(student, wide).mean()
    assert value.item() == pytest.approx(oracles.cka(s, t, unbiased=True).mean(), rel=1e-9)


def test_between_does_not_change_the_distance_of_one_vector_per_example():
    student, teacher = f64(6, 5)
    for between in (kdloss.distances.between_tokens, kdloss.distances.between_examples):
        torch.testing.assert_close(
            between(kdloss.distances.pkt)(student, teacher), kdloss.distances.pkt(student, teacher)
        )


def test_between_passes_the_options_of_the_call_to_the_distance():
    student, teacher = f64(3, 4, 5)
    for between in (kdloss.distances.between_tokens, kdloss.distances.between_examples):
        passed = between(kdloss.distances.correlation_congruence)(student, teacher, mask=MASK[:3], gamma=1.0)
        bound = between(partial(kdloss.distances.correlation_congruence, gamma=1.0))(student, teacher, mask=MASK[:3])
        default = between(kdloss.distances.correlation_congruence)(student, teacher, mask=MASK[:3])
        torch.testing.assert_close(passed, bound)
        assert (passed - default).abs().max() > 1e-4


@pytest.mark.parametrize("between", [kdloss.distances.between_tokens, kdloss.distances.between_examples])
def test_between_refuses_a_distance_of_single_positions(between):
    with pytest.raises(TypeError, match=r"mse compares each position with its own partner only"):
        between(kdloss.distances.mse)
    with pytest.raises(TypeError, match="FeatureKD"):
        between(partial(kdloss.distances.cosine, eps=1e-6))


def test_unbiased_cka_needs_four_rows_and_gives_zero_where_a_mask_leaves_fewer():
    """With three rows U-centring leaves only rounding errors, which must not be scaled up to unit length."""
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    with pytest.raises(ValueError, match="at least 4 rows"):
        kdloss.distances.cka(student, teacher, unbiased=True)
    student, teacher = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5)
    for left in (1, 2, 3):
        mask = (torch.arange(6) < left).expand(2, 6)
        value = kdloss.distances.cka(student, teacher, mask=mask, unbiased=True)
        assert not value.any()
        assert not torch.autograd.grad(value.sum(), student)[0].any()
