"""Our losses beside the plain PyTorch recipe: `make bench`. No test asserts a time."""

import pytest
import recipes
import torch
import torch.nn.functional as F

import kdloss

PAIRS = {
    "KL + CE": (recipes.kl_ce, kdloss.VanillaKD(recipes.T, 0.5)),
    "JSD": (recipes.jsd, kdloss.VanillaKD(recipes.T, 0.0, divergence=kdloss.divergences.jsd)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "vocab"), [(256, 32_000), (2048, 32_000), (256, 128_256)])
@pytest.mark.parametrize("which", [0, 1], ids=["plain", "kdloss"])
@pytest.mark.parametrize("terms", PAIRS)
def test_logits(benchmark, terms, which, tokens, vocab, dtype):
    benchmark.group = f"{terms}, forward and backward, {tokens} x {vocab} {dtype}"
    torch.manual_seed(0)
    student, teacher = torch.randn(2, tokens, vocab).to(dtype)
    student, labels = student.clone().requires_grad_(), torch.randint(0, vocab, (tokens,))

    def step():
        value = PAIRS[terms][which](student, teacher, labels)
        value.backward()
        student.grad = None
        return value.detach()

    value = benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    if which:  # the recipe in bfloat16 is off by a tenth
        exact = PAIRS[terms][0](student.double(), teacher.double(), labels)
        torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.benchmark(group="feature MSE, forward and backward, 8 x 128 x 768")
@pytest.mark.parametrize("distance", [F.mse_loss, kdloss.distances.mse], ids=["plain", "kdloss"])
def test_features(benchmark, distance):
    student, teacher = torch.randn(8, 128, 768, requires_grad=True), torch.randn(8, 128, 768)

    def step():
        value = distance(student, teacher).mean()
        value.backward()
        return value.detach()

    torch.testing.assert_close(benchmark(step), F.mse_loss(student, teacher).detach())
