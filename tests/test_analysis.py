"""CKA between blocks, compared with its definition, and the pairing that it suggests."""

import numpy as np
import pytest
import torch
from families import FAMILIES, ResNet, batch, blocks_argument, build
from torch import nn

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def hsic(x, y):
    """HSIC_1 of Song et al. 2012 for two kernels, term by term."""
    n, ones = len(x), np.ones(len(x))
    x, y = x - np.diag(np.diag(x)), y - np.diag(np.diag(y))
    mixed = (ones @ x @ ones) * (ones @ y @ ones) / ((n - 1) * (n - 2))
    return (np.trace(x @ y) + mixed - 2 / (n - 2) * (ones @ x @ y @ ones)) / (n * (n - 3))


def by_hand(student, teacher):
    """Minibatch CKA (Nguyen et al. 2021) of features [batches][blocks][n, D]."""
    grams = [[[x @ x.T for x in blocks] for blocks in side] for side in (student, teacher)]

    def mean(a, i, b, j):
        return np.mean([hsic(x[i], y[j]) for x, y in zip(grams[a], grams[b], strict=True)])

    return np.array(
        [
            [mean(0, i, 1, j) / np.sqrt(mean(0, i, 0, i) * mean(1, j, 1, j)) for j in range(len(teacher[0]))]
            for i in range(len(student[0]))
        ]
    )


class Tokens(nn.Module):
    """A model whose blocks look up the features of `[B, T]` ids, each in one table."""

    def __init__(self, *tables):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Embedding.from_pretrained(torch.as_tensor(t)) for t in tables)

    def forward(self, ids, **inputs):
        return [block(ids) for block in self.blocks]


def tables(*widths, seed=0, tokens=40):
    rng = np.random.default_rng(seed)
    return [3 + rng.normal(size=(tokens, d)) @ np.diag(np.arange(1, d + 1)) for d in widths]


def test_values_equal_the_minibatch_cka_of_the_papers():
    s, t = tables(5, 3), tables(4, 6, 5, seed=1)
    student, teacher = Tokens(*s), Tokens(*t)
    ids = [torch.randint(0, 40, (2, n), generator=torch.Generator().manual_seed(n)) for n in (9, 4, 6)]
    cka = kdloss.analysis.cka_matrix(student, teacher, [{"ids": x} for x in ids])
    rows = [x.flatten().numpy() for x in ids]
    expected = by_hand([[x[r] for x in s] for r in rows], [[x[r] for x in t] for r in rows])
    np.testing.assert_allclose(cka.values, expected, rtol=1e-9, atol=1e-12)
    assert cka.values.dtype == torch.float64
    as_tuples = kdloss.analysis.cka_matrix(student, teacher, ((x,) for x in ids))
    assert torch.equal(as_tuples.values, cka.values)


def test_rotations_shifts_and_scaling_do_not_change_cka():
    (x,), (y,) = tables(5), tables(5, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    ids = {"ids": torch.arange(40)[None]}
    plain = kdloss.analysis.cka_matrix(Tokens(x), Tokens(y), [ids]).values
    moved = kdloss.analysis.cka_matrix(Tokens(x), Tokens(1e3 * y @ rotation - 50), [ids]).values
    np.testing.assert_allclose(moved, plain, rtol=1e-9)
    with_itself = kdloss.analysis.cka_matrix(Tokens(x), Tokens(0.1 * x @ rotation + 7), [ids]).values
    assert with_itself.item() == pytest.approx(1, abs=1e-12)
    stretched = kdloss.analysis.cka_matrix(Tokens(x), Tokens(x @ np.diag([9, 1, 1, 1, 1])), [ids]).values
    assert stretched.item() < 0.9


@pytest.mark.parametrize("number", [0.1, 1 / 3, 7e5 + 0.1])
def test_constant_features_have_a_cka_of_0(number):
    constant, varying = np.full((40, 3), number), tables(4)
    cka = kdloss.analysis.cka_matrix(Tokens(constant), Tokens(*varying), [torch.arange(37)[None]])
    assert cka.values.tolist() == [[0.0]]


def test_cka_of_vectors_compares_the_examples():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2)]),
        torch.randn(6, 5),
    )
    with torch.no_grad():
        first = model[0](x)
        rows = [[first.double().numpy(), model[1](first).double().numpy()]]
    np.testing.assert_allclose(kdloss.analysis.cka_matrix(model, model, [x]).values, by_hand(rows, rows), rtol=1e-6)


def test_dropout_is_switched_off_and_training_modes_are_restored():
    model, inputs = build("gpt2").train(), batch("gpt2")
    plain = kdloss.analysis.cka_matrix(model, model, [inputs]).values
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert torch.equal(kdloss.analysis.cka_matrix(model, model, [inputs]).values, plain)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_model_have_a_cka_of_1_with_themselves_and_padding_does_not_count(family):
    model, inputs = build(family), batch(family)
    blocks = blocks_argument(family)
    cka = kdloss.analysis.cka_matrix(model, model, [inputs], blocks=blocks)
    assert cka.values.shape == (3, 3)
    np.testing.assert_allclose(cka.values.diagonal(), 1, rtol=1e-9)
    np.testing.assert_allclose(cka.values, cka.values.T, rtol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    if family != "vit":
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
        repeated = kdloss.analysis.cka_matrix(model, model, [inputs | {"input_ids": ids}], blocks=blocks)
        np.testing.assert_allclose(repeated.values, cka.values, rtol=1e-5)


def test_padding_of_an_encoder_does_not_count():
    model, inputs = build("t5"), batch("t5")
    cka = kdloss.analysis.cka_matrix(model, model, [inputs], blocks="encoder.block")
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
    repeated = kdloss.analysis.cka_matrix(model, model, [inputs | {"input_ids": ids}], blocks="encoder.block")
    np.testing.assert_allclose(repeated.values, cka.values, rtol=1e-5)


def test_the_same_positions_count_as_in_feature_kd():
    """The model is causal: features at t belong to the label at t+1."""
    model, inputs = build("gpt2").eval(), batch("gpt2")
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :4] = -100
    cka = kdloss.analysis.cka_matrix(model, model, [inputs])
    with torch.no_grad(), kdloss.capture(model, [0, 1, 2]) as seen:
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    keep = (inputs["labels"] != -100)[:, 1:]
    rows = [[seen[i][:, :-1][keep].double().numpy() for i in range(3)]]
    np.testing.assert_allclose(cka.values, by_hand(rows, rows), rtol=1e-6)


@pytest.mark.parametrize(("blocks", "width"), [((1, 2), 6), ((2, 1), 4)])
def test_cka_of_a_cnn_compares_flattened_examples(blocks, width):
    teacher, images = ResNet((1, 1, 1)).eval(), torch.randn(5, 3, 8, 8)
    student = ResNet(blocks, width).eval()
    cka = kdloss.analysis.cka_matrix(student, teacher, [{"x": images}, images + 1])
    sides = []
    for model, depth in ((student, 3), (teacher, 3)):
        sides.append([])
        for x in (images, images + 1):
            with torch.no_grad(), kdloss.capture(model, range(depth)) as seen:
                model(x)
            sides[-1].append([seen[i].flatten(1).double().numpy() for i in range(depth)])
    np.testing.assert_allclose(cka.values, by_hand(*sides), rtol=1e-6)


def test_samples_are_limited_and_every_run_draws_the_same():
    s, t = Tokens(*tables(5, tokens=400)), Tokens(*tables(4, seed=1, tokens=400))
    batches = [{"ids": torch.arange(400).view(8, 50)}]
    sizes, square = [], torch.Tensor.fill_diagonal_

    def counting(x, value):
        sizes.append(len(x))
        return square(x, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "fill_diagonal_", counting)
        first = kdloss.analysis.cka_matrix(s, t, batches, samples=32).values
    assert set(sizes) == {32}
    torch.manual_seed(7)
    assert torch.equal(kdloss.analysis.cka_matrix(s, t, batches, samples=32).values, first)
    assert not torch.equal(kdloss.analysis.cka_matrix(s, t, batches).values, first)


def test_too_few_samples_are_refused():
    model = Tokens(*tables(5))
    with pytest.raises(ValueError, match=r"batch 1 has 3 samples.*needs 4.*drop_last=True"):
        kdloss.analysis.cka_matrix(model, model, [torch.arange(4)[None], torch.arange(3)[None]])
    with pytest.raises(ValueError, match="no batch"):
        kdloss.analysis.cka_matrix(model, model, [])
    with pytest.raises(ValueError, match="samples=3"):
        kdloss.analysis.cka_matrix(model, model, [], samples=3)


def matrix(values):
    return kdloss.analysis.CKAMatrix(torch.tensor(values, dtype=torch.float64))


def test_the_suggested_pairing_is_the_best_non_decreasing_one():
    rng = np.random.default_rng(0)
    for students, teachers in [(1, 5), (3, 6), (4, 3), (4, 4)]:
        values = rng.random((students, teachers))
        pairs = matrix(values).pairing("all")
        ascending = [partners for partners in np.ndindex(*[teachers] * students) if list(partners) == sorted(partners)]
        best = max(ascending, key=lambda p: sum(values[s, t] for s, t in enumerate(p)))
        assert pairs == [(s, t, 1 / students) for s, t in enumerate(best)]
    crossed = matrix([[0.1, 0.2, 0.9], [0.8, 0.1, 0.7]])
    assert [p[:2] for p in crossed.pairing("all")] == [(0, 2), (1, 2)]
    assert crossed.pairing([-1]) == [(1, 0, 1.0)]
    assert len(matrix(np.eye(12).tolist()).pairing()) == 4  # "auto"


def test_a_student_of_kept_blocks_is_paired_with_the_blocks_it_was_copied_from_and_has_no_loss():
    teacher = build("llama", width=32, depth=6, seed=3)
    student = kdloss.keep_blocks(teacher, [0, 1, 2])
    cka = kdloss.analysis.cka_matrix(student, teacher, [batch("llama")])
    np.testing.assert_allclose(cka.values.diagonal(), 1, rtol=1e-6)
    pairs = cka.pairing("all")
    assert [p[:2] for p in pairs] == [(0, 0), (1, 1), (2, 2)]
    criterion = kdloss.FeatureKD(pairing=pairs, alpha=0.0)
    assert kdloss.Distiller(teacher, criterion).prepare(student)(student, **batch("llama")).loss < 1e-9


def test_the_heat_map_has_the_teacher_on_x_and_block_0_at_the_bottom_left(tmp_path):
    from matplotlib.figure import Figure

    cka = matrix([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]])
    figure = Figure()
    axes = figure.subplots()
    cka.heatmap(axes)
    image = axes.get_images()[0]
    np.testing.assert_array_equal(image.get_array(), cka.values)
    assert image.origin == "lower"
    assert image.get_clim() == (0, 1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("teacher block", "student block")
    assert [tuple(p) for p in axes.lines[0].get_xydata()] == [(0, 0), (2, 1)]
    cka.heatmap(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
