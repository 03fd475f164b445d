"""Computation in blocks: the sizes of blocks, averages of lazy teachers, and the gradient of a head."""

import numpy as np
import oracles
import pytest
import torch
from parts.memory import LiveTensors
from test_engine import multiplications

import kdloss
from kdloss import LazyLogits, Mixture, VanillaKD
from kdloss.engine import LabelTask, Problem, TeacherTask, fused, gradients
from kdloss.engine.block_sizes import block_rows, equal_blocks

N, V, D, T = 7, 11, 3, 2.0
INF = float("inf")
LABELS = torch.tensor([3, -100, 0, 10, 5, 2, 7])
KEEP = (LABELS != -100).numpy()
WEIGHTS = [0.2, 0.3, 0.0, 0.5]


def lazy(seed, classes=V, dtype=torch.float64, tokens=N, bias=True, **options):
    """Return lazy logits of random hidden states and a random head."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, D), (classes, D), (classes,)][: 3 if bias else 2]
    return LazyLogits(*(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes), **options)


def group(classes=V, dtype=torch.float64):
    """Return four teachers, none of which has class 3; the first has no class 5 either."""
    teachers = [lazy(k, classes, dtype, softcap=4.0 if k == 4 else None) for k in (1, 2, 3)] + [lazy(4, classes, dtype)]
    for k, teacher in enumerate(teachers):
        teacher.bias[[3, 5] if k == 0 else [3]] = -INF
    return teachers


def numbers(x):
    return x.detach().double().numpy()


def average(teachers, weights, how, temperature=T):
    """Return the logits of the average of teachers, in numpy."""
    pairs = [(w, t) for w, t in zip(weights, teachers, strict=True) if w]
    if how == "logits":
        return sum(w * t for w, t in pairs)
    with np.errstate(divide="ignore"):
        return temperature * np.log(sum(w * np.exp(oracles.log_softmax(t, temperature)) for w, t in pairs))


# -- mixtures --


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_an_average_is_exact_where_no_teacher_has_a_class(dtype):
    teachers = [numbers(x.dense()) for x in group()]
    leaves = [torch.tensor(t, dtype=dtype, requires_grad=True) for t in teachers]
    z = Mixture(leaves, WEIGHTS).dense(T)
    upstream = torch.randn(N, V, dtype=dtype)
    z.masked_fill(z.isneginf(), 0).backward(upstream)
    exact = average(teachers, WEIGHTS, "probabilities")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(numbers(z), exact, rtol=tolerance, atol=tolerance)
    u = zero_unless_finite(numbers(upstream), exact)
    for leaf, t, w in zip(leaves, teachers, WEIGHTS, strict=True):
        p = np.exp(oracles.log_softmax(t, T))
        share = zero_unless_finite(w * p / np.exp(np.where(np.isfinite(exact), exact, 0) / T), exact)
        slope = share * u - p * (share * u).sum(-1, keepdims=True)  # the derivative by hand; T cancels out
        gradient = np.zeros_like(slope) if leaf.grad is None else numbers(leaf.grad)
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=tolerance * 10)


def zero_unless_finite(x, like):
    return np.where(np.isfinite(like), x, 0)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_an_average_has_second_derivatives(how):
    leaves = [lazy(k).dense().detach()[:2, :4].requires_grad_() for k in (1, 2, 3)]

    def dense(*teachers):
        return Mixture(teachers, average=how).dense(T)

    assert torch.autograd.gradcheck(dense, leaves)
    assert torch.autograd.gradgradcheck(dense, leaves)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_eight_teachers_are_averaged_in_the_memory_of_two(how):
    teachers = [torch.randn(16, 512) for _ in range(8)]

    def peak(count):
        with LiveTensors() as live:
            Mixture(teachers[:count], average=how).dense(T)
        return live.peak

    assert peak(8) == peak(2)


# -- averages of lazy teachers, block by block --

VOCABULARIES = {
    "same": (None, None, V, V),
    "truncated": (kdloss.truncate, slice(0, 9), 9, V),
    "mapped": (kdloss.TokenMap(torch.arange(8), torch.arange(8).flip(0)), [7, 6, 5, 4, 3, 2, 1, 0], V, V),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("how", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_averages_of_lazy_teachers_equal_those_of_their_full_logits(vocabulary, how, dtype, block_sizes):
    mapping, theirs, mine, classes = VOCABULARIES[vocabulary]
    student, teachers = lazy(0, mine, dtype), group(classes, dtype)
    leaves = [x.requires_grad_() for x in (student.hidden, student.weight, student.bias)]
    labels = LABELS.clamp_max(mine - 1)
    loss = VanillaKD(T, 0.3, vocabulary=mapping)(LazyLogits(*leaves), Mixture(teachers, WEIGHTS, how), labels)
    dense = [numbers(x.dense())[KEEP][:, slice(None) if theirs is None else theirs] for x in teachers]
    target, at = average(dense, WEIGHTS, how), slice(0, 8) if vocabulary == "mapped" else slice(None)

    def oracle(h, w, b):
        z = (h @ w.T + b)[KEEP]
        ce = oracles.cross_entropy(z, labels.numpy()[KEEP])
        return (0.3 * ce + 0.7 * oracles.forward_kl(z[:, at], target, T)).mean()

    x = [numbers(leaf) for leaf in leaves]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(oracle(*x), rel=tolerance)
    loss.backward()
    for k, leaf in enumerate(leaves):
        exact = oracles.gradient(lambda v, k=k: oracle(*x[:k], v, *x[k + 1 :]), x[k])
        np.testing.assert_allclose(numbers(leaf.grad), exact, rtol=0, atol=tolerance * abs(exact).max())


def test_a_teachers_logits_are_computed_once_for_all_terms_averages_and_temperatures(block_sizes):
    student, teachers = lazy(0, bias=False), [lazy(k, bias=False) for k in (1, 2, 3, 4)]
    student = LazyLogits(student.hidden.requires_grad_(), student.weight.requires_grad_())
    divergences = kdloss.divergences

    def cost(*tasks):
        tasks = [LabelTask(LABELS.clamp_min(0)), *tasks]
        problem, local = Problem.of(tasks, student, None, N)
        return multiplications(lambda: fused(problem, local, torch.ones(len(tasks), 1))[0].backward()) / (N * V * D)

    mixed = [TeacherTask(divergences.forward_kl, Mixture(teachers), t) for t in (1.0, 2.0)]
    assert cost(*mixed) == 3 + 4
    assert cost(*mixed, TeacherTask(divergences.jsd, teachers[1])) == 3 + 4
    assert cost(*mixed, TeacherTask(divergences.jsd, Mixture(teachers[:3]))) == 3 + 4
    unread = Mixture(teachers, [0.5, 0.25, 0.25, 0.0])
    assert cost(TeacherTask(divergences.forward_kl, unread)) == 3 + 3


def test_averages_and_single_teachers_that_share_logits_equal_the_oracle(block_sizes):
    student, teachers = lazy(0).dense().requires_grad_(), [lazy(k) for k in (1, 2, 3, 4)]
    mixed = [Mixture(teachers), Mixture(teachers[:3], [0.5, 0.25, 0.25]), Mixture(teachers, average="logits")]
    reads = [(m, t) for m in mixed for t in (1.0, 3.0)] + [(teachers[1], 2.0)]
    tasks = [TeacherTask(kdloss.divergences.forward_kl, x, t) for x, t in reads]
    _, values = fused(*Problem.of(tasks, student, None, N), torch.ones(len(tasks), 1))
    for value, (x, t) in zip(values, reads, strict=True):
        dense = [numbers(teacher.dense()) for teacher in getattr(x, "teachers", [x])]
        weights = getattr(x, "weights", None) or [1 / len(dense)] * len(dense)
        target = average(dense, weights, getattr(x, "average", "logits"), t)
        np.testing.assert_allclose(value, oracles.forward_kl(numbers(student), target, t), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_averaging_several_lazy_teachers_takes_the_memory_of_one(count, dtype, block_sizes):
    block_sizes(256, 4)
    tokens, classes = 256, 2_000
    teachers = [lazy(k, classes, dtype, tokens, bias=False) for k in range(1, 9)]
    student = lazy(0, classes, dtype, tokens, bias=False)
    student = LazyLogits(student.hidden.requires_grad_(), student.weight.requires_grad_())
    labels = torch.zeros(tokens, dtype=torch.long)

    def peak(teacher):
        with LiveTensors() as live:
            VanillaKD(T, 0.5)(student, teacher, labels).backward()
        return live.peak

    assert peak(Mixture(teachers[:count])) <= 1.1 * peak(teachers[0])


# -- the head's gradient --


def overwriting_addmm(total, a, b, out_dtype, out):
    """Overwrite `out` instead of adding to `total`."""
    out.copy_(a.to(out_dtype) @ b.to(out_dtype))


def adding_addmm(total, a, b, out_dtype, out):
    out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))


def product(a, b, out_dtype):
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.mark.parametrize(
    ("supported", "expected"),
    [
        ({}, None),
        ({"mm": product}, "_in_two_steps"),
        ({"mm": product, "addmm": overwriting_addmm}, "_in_two_steps"),
        ({"mm": product, "addmm": adding_addmm}, "_in_place"),
    ],
)
def test_16_bit_products_are_added_unrounded_by_operators_that_the_device_supports(supported, expected, monkeypatch):
    class Torch:
        def __getattr__(self, name):
            return supported.get(name) or getattr(torch, name)

    monkeypatch.setattr(gradients, "torch", Torch())
    gradients.wide_product.cache_clear()
    chosen = gradients.wide_product("cpu", torch.bfloat16, torch.float32)
    assert chosen is (None if expected is None else getattr(gradients, expected))
    a, b = torch.randn(30, 40).bfloat16(), torch.randn(40, 5).bfloat16()
    total = torch.randn(30, 5)
    exact = total.double() + a.double() @ b.double()
    gradients.add_product(total, a, b, rows=7)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-5)
    gradients.wide_product.cache_clear()


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_heads_gradient_is_rounded_once_and_held_in_float32_only_over_several_blocks(dtype, block, block_sizes):
    tokens, classes, width = 64, 300, 100
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight, bias = (torch.zeros(shape, dtype=dtype).requires_grad_() for shape in ((classes, width), (classes,)))
    head = kdloss.engine.gradients.OfHead(LazyLogits(hidden, weight, bias), rows_of_head(hidden, weight, bias), None)
    slope = torch.randn(tokens, classes).to(dtype)
    largest = []

    class Largest(LiveTensors):
        def count(self, storage):
            largest.append(storage.nbytes())
            super().count(storage)

    with torch.no_grad(), Largest():
        for start, stop in equal_blocks(tokens, block):
            head.rows_of.make(start, stop)
            head.rows_of(start, stop).copy_(slope[start:stop])
            head.block(start, stop)
        results = head.tensors()
    exact = [slope.double() @ weight.double(), slope.double().T @ hidden.double(), slope.double().sum(0)]
    for ours, expected in zip(results, exact, strict=True):
        assert ours.dtype == dtype
        rounding = 1e-5 if dtype.itemsize >= 4 else torch.finfo(dtype).eps
        assert (ours.double() - expected).abs().max() <= rounding * expected.abs().max()
        if dtype.itemsize < 4:
            error, least = ((x.double() - expected).norm() for x in (ours, expected.to(dtype)))
            assert error <= 1.01 * least
    narrow = classes * width * dtype.itemsize
    assert max(largest) == (narrow if dtype.itemsize >= 4 or block == tokens else classes * width * 4)


def rows_of_head(hidden, weight, bias):
    return kdloss.engine.rows.Rows(LazyLogits(hidden.detach(), weight.detach(), bias.detach()), None)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_head_gets_a_gradient_of_zeros_if_all_labels_are_ignored(alpha):
    x = lazy(0)
    leaves = [t.requires_grad_() for t in (x.hidden, x.weight, x.bias)]
    VanillaKD(T, alpha)(LazyLogits(*leaves), lazy(1), torch.full_like(LABELS, -100)).backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


# -- sizes of blocks --


def test_blocks_fit_in_128_mib_except_for_1024_rows_on_an_accelerator():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    fp32, bf16 = (lambda classes, size=size: 2 * size * classes for size in (4, 2))
    rows = {
        vocab: [block_rows(d, size(vocab)) for d in (cpu, cuda) for size in (fp32, bf16)] for vocab in (32_000, 128_256)
    }
    assert rows == {32_000: [512, 1024, 1024, 1024], 128_256: [128, 256, 1024, 1024]}
    assert block_rows(cpu, fp32(1_000)) == 1024
    assert block_rows(cuda, fp32(1_000)) == 2**27 // 8_000 // 128 * 128
    assert block_rows(cpu, 0) > 0


@pytest.mark.parametrize(("rows", "most"), [(257, 200), (10, 3), (7, 7), (0, 4), (5, 1)])
def test_blocks_cover_all_rows_and_the_first_is_the_largest(rows, most):
    blocks = list(equal_blocks(rows, most, 100))
    sizes = [stop - start for start, stop in blocks]
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(100, 100 + rows))
    assert max(sizes, default=0) == max(sizes[:1], default=0) <= most
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
