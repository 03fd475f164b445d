"""The lines of docs/guide.md, "What papers weigh", give the papers' numbers: formulas in float64 written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kdloss
from kdloss import Features
from kdloss.distances import attention_transfer, cwd, examples, fsp, mse, nst

B, H, W, S, T = 5, 3, 4, 6, 8  # examples, height, width, the student's channels, the teacher's


def holds(criterion, by_hand, student, teacher):
    """Value and gradient of a criterion on the last blocks' features, against a formula of both."""
    student.requires_grad_()
    outputs = (SimpleNamespace(hidden_states=[x, x]) for x in (student, teacher))
    expected, value = by_hand(student, teacher), criterion(*outputs, torch.arange(B))
    torch.testing.assert_close(value, expected)
    assert expected > 0
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (value, expected)))


def maps(s=S, t=T):
    return torch.randn(B, s, H, W, dtype=torch.float64), torch.randn(B, t, H, W, dtype=torch.float64)


def pooled():
    return torch.randn(B, S, dtype=torch.float64), torch.randn(B, T, dtype=torch.float64)


@pytest.mark.parametrize("features", [maps, pooled])
def test_similarity_preserving_weighs_3000(features):
    def paper(s, t):
        grams = [F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (s, t)]
        return 3000 * (grams[0] - grams[1]).square().sum() / B**2

    holds(3000.0 * Features("last", distance=examples.similarity), paper, *features())


@pytest.mark.parametrize("features", [maps, pooled])
def test_rkd_weighs_25_and_50(features):
    def relations(x):
        arms = x.flatten(1)[None] - x.flatten(1)[:, None]
        lengths = arms.square().sum(-1).add(torch.eye(B)).sqrt() * (1 - torch.eye(B))
        sides = F.normalize(arms, dim=-1)
        return lengths / (lengths.sum() / (B * (B - 1))), torch.einsum("ijd,ikd->ijk", sides, sides)

    def paper(s, t):
        (d, a), (e, b) = relations(s), relations(t)
        return 25 * F.smooth_l1_loss(d, e) + 50 * F.smooth_l1_loss(a, b)

    by_distance = 25.0 * Features("last", distance=examples.rkd_distance, name="distance")
    holds(by_distance + 50.0 * Features("last", distance=examples.rkd_angle, name="angle"), paper, *features())


@pytest.mark.parametrize("features", [maps, pooled])
def test_pkt_weighs_30000(features):
    def neighbours(x):
        unit = F.normalize(x.flatten(1), dim=1)
        near = (unit @ unit.T + 1) / 2 + 1e-7  # there where the authors' code adds it to the shares
        return near / near.sum(1, keepdim=True)

    def paper(s, t):
        q, p = neighbours(s), neighbours(t)
        return 30000 * (p * (p / q).log()).mean()

    holds(30000.0 * Features("last", distance=examples.pkt), paper, *features())


def test_correlation_congruence_is_the_papers_without_a_weight():
    def kernel(x):
        cosines = F.normalize(x.flatten(1), dim=1) @ F.normalize(x.flatten(1), dim=1).T
        return torch.exp(torch.tensor(-0.8, dtype=torch.float64)) * (1 + 0.8 * cosines + 0.32 * cosines**2)

    def paper(s, t):
        return (kernel(s) - kernel(t)).square().sum() / B**2

    holds(1.0 * Features("last", distance=examples.correlation_congruence), paper, *maps())


def test_attention_transfer_weighs_1000_for_each_layer():
    def attention(x):
        return F.normalize(x.square().mean(1).flatten(1), dim=1)

    def paper(s, t):  # of the two blocks, which give the same here
        return 2 * 1000 * (attention(s) - attention(t)).square().mean()

    student, teacher = maps()
    student.requires_grad_()
    outputs = (SimpleNamespace(hidden_states=[x, x, x]) for x in (student, teacher))
    value = (2 * 1000.0 * Features("all", distance=attention_transfer))(*outputs, torch.arange(B))
    expected = paper(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (value, expected)))


def test_neuron_selectivity_weighs_50():
    def kernel(x, y):
        x, y = (F.normalize(z.flatten(2), dim=2) for z in (x, y))
        return torch.einsum("bcn,bdn->bcd", x, y).square().mean()

    def paper(s, t):
        return 50 * (kernel(s, s) + kernel(t, t) - 2 * kernel(s, t))

    holds(50.0 * Features("last", distance=nst), paper, *maps())


def test_fitnets_weighs_100():
    holds(100.0 * Features("last", distance=mse), lambda s, t: 100 * (s - t).square().mean(), *maps(S, S))


def test_channel_wise_distillation_weighs_50():
    def paper(s, t):
        log_q, log_p = ((x.flatten(2) / 4).log_softmax(2) for x in (s, t))
        return 50 * 16 * (log_p.exp() * (log_p - log_q)).sum() / (B * S)

    holds(50.0 * Features("last", distance=cwd), paper, *maps(S, S))


def test_flow_of_the_solution_procedure_weighs_50_by_entry():
    early = 2

    def flow(x):
        return torch.einsum("bcn,bdn->bcd", x.flatten(2)[:, :early], x.flatten(2)[:, early:]) / (H * W)

    def paper(s, t):
        return 50 * (flow(s) - flow(t)).square().mean()

    def two_layers(s, t, mask=None):
        return fsp(s, t, mask=mask, split=early)

    holds(50 / (early * (S - early)) * Features("last", distance=two_layers), paper, *maps(S, S))


def test_hintons_in_the_benchmark_is_a_tenth_of_cross_entropy_and_nine_of_kl_at_4():
    student, teacher = torch.randn(2, B, 7, dtype=torch.float64)
    labels = torch.arange(B)
    p, q = (x / 4 for x in (teacher, student))
    kl = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    expected = 0.1 * F.cross_entropy(student, labels) + 0.9 * 16 * kl
    torch.testing.assert_close(kdloss.VanillaKD(temperature=4.0, alpha=0.1)(student, teacher, labels), expected)
