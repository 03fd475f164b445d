"""The laws of cross-entropy, the only exported loss without a teacher; test_extremes.py compares 50 digits."""

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from losses import TOLERANCE, sample

import kdloss

LABELS = torch.tensor([[0, 3, 2, 4], [1, 1, 0, 2], [4, 0, 3, 3]])
MASK = torch.tensor([[True, True, False, True], [True, False, True, True], [True, True, True, False]])


def grad(value, logits):
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_value_and_gradient_agree_with_the_float64_oracle(dtype):
    logits, _ = sample(3, 4, 5, dtype=dtype)
    value = kdloss.cross_entropy(logits, LABELS)
    slope = grad(value.sum(), logits)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert slope.dtype == dtype
    z, y, tolerance = logits.detach().double().numpy(), LABELS.numpy(), TOLERANCE[dtype]
    np.testing.assert_allclose(value.detach(), oracles.cross_entropy(z, y), rtol=tolerance, atol=tolerance)
    exact = oracles.gradient(lambda x: oracles.cross_entropy(x, y), z)
    rounding = max(tolerance, torch.finfo(dtype).eps)
    np.testing.assert_allclose(slope.double(), exact, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_float64_logits_lose_no_digits_to_float32_class_weights(smoothing):
    logits, _ = sample(3, 4, 5, dtype=torch.float64)
    weight = torch.tensor([0.1, 1.0, 0.7, 3.0, 0.0])
    criterion = 1.0 * kdloss.CrossEntropy(label_smoothing=smoothing, class_weights=weight)
    value = criterion(logits, None, LABELS)
    z, w = logits.detach().numpy(), weight.double().numpy()
    exact = oracles.cross_entropy(z, LABELS.numpy(), smoothing, w)
    assert value.item() == pytest.approx(exact.mean(), rel=1e-12)
    slope = oracles.gradient(lambda x: oracles.cross_entropy(x, LABELS.numpy(), smoothing, w), z) / exact.size
    np.testing.assert_allclose(grad(value, logits), slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 1.0])])
def test_with_smoothing_of_1_the_label_has_no_weight_even_where_its_class_is_excluded(weight):
    logits = torch.tensor([[0.5, -float("inf"), 1.0]])
    value = (1.0 * kdloss.CrossEntropy(label_smoothing=1.0, class_weights=weight))(logits, None, torch.tensor([1]))
    assert value.item() == (float("inf") if weight is None else pytest.approx(0.482718, rel=1e-5))


def test_gradcheck_and_gradgradcheck_hold():
    logits, _ = sample(3, 4, 5, dtype=torch.float64)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda z: kdloss.cross_entropy(z, LABELS), logits)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_at_masked_positions_never_matter(garbage):
    logits, _ = sample(3, 4, 5)
    clean = kdloss.masked(kdloss.cross_entropy, logits, LABELS, MASK)
    clean_grad = grad(clean, logits)
    dirty, labels = logits.detach().clone(), LABELS.clone()
    dirty[~MASK], labels[~MASK] = garbage, 10**9
    dirty.requires_grad_()
    value = kdloss.masked(kdloss.cross_entropy, dirty, labels, MASK)
    slope = grad(value, dirty)
    assert torch.equal(value, clean)
    assert torch.equal(slope, clean_grad)
    assert not slope[~MASK].any()


def test_micro_batches_add_up_to_the_batch_and_an_empty_mask_gives_zero():
    logits, _ = sample(3, 4, 5, dtype=torch.float64)
    full = kdloss.masked(kdloss.cross_entropy, logits, LABELS, MASK)
    micro_batches = [
        kdloss.masked(
            kdloss.cross_entropy, logits[i : i + 1], LABELS[i : i + 1], MASK[i : i + 1],
            num_items_in_batch=MASK.sum(),
        )
        for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(sum(micro_batches), full, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(sum(micro_batches), logits), grad(full, logits), rtol=1e-12, atol=1e-15)
    none = kdloss.masked(kdloss.cross_entropy, logits, LABELS, torch.zeros_like(MASK))
    assert none == 0
    assert not grad(none, logits).any()


def test_cross_entropy_compiles_without_a_graph_break_and_runs_on_meta():
    logits, _ = sample(3, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: kdloss.masked(kdloss.cross_entropy, z, LABELS, MASK),
        fullgraph=True,
        backend="aot_eager",
    )
    plain = kdloss.masked(kdloss.cross_entropy, logits, LABELS, MASK)
    torch.testing.assert_close(compiled(logits), plain)
    torch.testing.assert_close(grad(compiled(logits), logits), grad(plain, logits))
    assert kdloss.cross_entropy(logits.to("meta"), LABELS.to("meta")).is_meta


# -- soft labels are probabilities --

GIVEN = {
    "several yes or no": torch.tensor([[0.0, 1, 0, 1, 0]]),
    "percent": torch.tensor([[10.0, 20, 30, 40, 0]]),
    "logits": torch.tensor([[2.0, -1, 0.5, 0, -0.5]]),
    "negative": torch.tensor([[1.5, -0.5, 0, 0, 0]]),
    "nothing": torch.zeros(1, 5),
    "nan": torch.tensor([[torch.nan, 1, 0, 0, 0]]),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("check_finite", [False, True])
def test_soft_labels_that_are_no_probabilities_are_refused_by_every_way_to_the_cross_entropy(kind, check_finite):
    class Own(kdloss.CrossEntropy):
        def loss(self, step):
            return super().loss(step)

    soft = torch.full((4, 5), 0.2)
    soft[2] = GIVEN[kind]
    for term in (kdloss.CrossEntropy(), kdloss.CrossEntropy(positions="mask"), Own()):
        criterion = kdloss.Sum(term, 1.0 * kdloss.Logits(), check_finite=check_finite)
        for _ in range(2):  # in every step, not only in the first
            criterion(torch.randn(4, 5), torch.randn(4, 5), torch.full((4, 5), 0.2))
            with pytest.raises(ValueError, match=r"labels\[2\] is \[.*sum\(-1.*softmax.*mask=.*binary_cross_entropy"):
                criterion(torch.randn(4, 5), torch.randn(4, 5), soft)


@pytest.mark.parametrize("causal", [False, True])
def test_soft_labels_at_positions_that_do_not_count_may_be_anything(causal):
    logits, _ = sample(3, 4, 5, dtype=torch.float64)
    soft = torch.rand(3, 4, 5, dtype=torch.float64).softmax(-1)
    soft[~MASK] = torch.tensor([7.0, -1, torch.nan, 0, torch.inf], dtype=torch.float64)
    if causal:
        soft[:, 0] = -3
    criterion = kdloss.Sum(kdloss.CrossEntropy(), causal=causal)
    value = criterion(logits, labels=soft, mask=MASK)
    z, y, keep = (logits[:, :-1], soft[:, 1:], MASK[:, 1:]) if causal else (logits, soft, MASK)
    expected = F.cross_entropy(z[keep], y[keep])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad(value, logits), grad(expected, logits))
    soft[1, 3] = 2  # a position that counts
    with pytest.raises(ValueError, match=r"labels\[1, 3\] is \[2.0, 2.0, 2.0, 2.0, 2.0\], 10 in sum"):
        criterion(logits, labels=soft, mask=MASK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_labels_rounded_to_16_bits_or_two_digits_are_probabilities(dtype):
    logits, _ = sample(8, 1000, dtype=torch.float64)
    soft = torch.randn(8, 1000, dtype=torch.float64).mul(3).softmax(-1).to(dtype)
    value = kdloss.CrossEntropy()(logits, labels=soft)
    expected = F.cross_entropy(logits, soft.double())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad(value, logits), grad(expected, logits))
    kdloss.CrossEntropy()(torch.randn(1, 3), labels=torch.tensor([[0.33, 0.33, 0.33]]))
