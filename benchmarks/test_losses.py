"""Our losses beside the plain PyTorch recipe: `make bench`. Nothing is asserted about time."""

import pytest
import torch
import torch.nn.functional as F

import kdloss

TOKENS, VOCAB, TEMPERATURE, ALPHA = 256, 32_000, 2.0, 0.5


def plain_recipe(student, teacher, labels):
    """What most training scripts write."""
    ce = F.cross_entropy(student, labels)
    kl = F.kl_div(
        (student / TEMPERATURE).log_softmax(-1),
        (teacher / TEMPERATURE).softmax(-1),
        reduction="batchmean",
    )
    return ALPHA * ce + (1 - ALPHA) * TEMPERATURE**2 * kl


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    student = torch.randn(TOKENS, VOCAB, requires_grad=True)
    return student, torch.randn(TOKENS, VOCAB), torch.randint(0, VOCAB, (TOKENS,))


@pytest.mark.benchmark(group="KL + CE, forward and backward, 256 x 32000")
@pytest.mark.parametrize(
    "loss", [plain_recipe, kdloss.VanillaKD(TEMPERATURE, ALPHA)], ids=["plain", "kdloss"]
)
def test_logits(benchmark, tensors, loss):
    def step():
        value = loss(*tensors)
        value.backward()
        return value.detach()

    value = benchmark(step)
    torch.testing.assert_close(value, plain_recipe(*tensors).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.benchmark(group="feature MSE, forward and backward, 8 x 128 x 768")
@pytest.mark.parametrize("distance", [F.mse_loss, kdloss.mse], ids=["plain", "kdloss"])
def test_features(benchmark, distance):
    student, teacher = torch.randn(8, 128, 768, requires_grad=True), torch.randn(8, 128, 768)

    def step():
        value = distance(student, teacher).mean()
        value.backward()
        return value.detach()

    torch.testing.assert_close(benchmark(step), F.mse_loss(student, teacher).detach())
