"""Balanced sums of terms, compared with the papers' formulas in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdloss
from kdloss import CrossEntropy, Features, Logits, Sum
from kdloss.balancing import Balance, RunningMagnitude, Uncertainty

N, V = 6, 5


def logits_and_labels(seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, N, V, dtype=torch.float64, generator=generator) * 2
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[0] = -100
    return student.clone().requires_grad_(requires_grad), teacher, labels


def ce_and_kd(student, teacher, labels):
    keep = labels != -100
    p, log_q = teacher[keep].softmax(-1), student[keep].log_softmax(-1)
    return F.cross_entropy(student, labels), (p * (p.log() - log_q)).sum(-1).mean()


def test_uncertainty_gives_kendalls_likelihood_and_its_gradients():
    criterion = Sum(0.3 * CrossEntropy() + 0.7 * Logits(), balance=Uncertainty()).double()
    logs = criterion.balance.logs
    with torch.no_grad():
        logs["ce"].fill_(0.4)
        logs["kd"].fill_(-1.1)
    student, *rest = logits_and_labels()
    s = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.4, -1.1)]
    ce, kd = ce_and_kd(student, *rest)
    by_hand = 0.3 * (-s[0]).exp() * ce + 0.7 * (-s[1]).exp() * kd + (s[0] + s[1]) / 2
    value = criterion(student, *rest)
    torch.testing.assert_close(value, by_hand)
    ours = torch.autograd.grad(value, [student, logs["ce"], logs["kd"]])
    torch.testing.assert_close(ours, torch.autograd.grad(by_hand, [student, *s]))
    torch.testing.assert_close(criterion.components["kd"], kd.detach())
    torch.testing.assert_close(criterion.components["kd/balance"], (-s[1]).exp().detach())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_of_a_balanced_sum_add_up(reduction):
    criterion = Sum(CrossEntropy() + Logits(), balance=Uncertainty(), reduction=reduction).double()
    with torch.no_grad():
        criterion.balance.logs["ce"].fill_(0.4)
    student, teacher, labels = logits_and_labels()
    items = {"num_items_in_batch": N - 1} if reduction == "mean" else {}
    full_batch = criterion(student, teacher, labels)
    cuts = [slice(0, 2), slice(2, N)]
    torch.testing.assert_close(sum(criterion(student[c], teacher[c], labels[c], **items) for c in cuts), full_batch)


def test_trained_uncertainty_matches_the_scale_of_a_term():
    criterion = Sum(CrossEntropy() + 100.0 * Logits(), balance=Uncertainty()).double()
    student, teacher, labels = logits_and_labels()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        criterion(student, teacher, labels).backward()
        optimizer.step()
    _, kd = ce_and_kd(student, teacher, labels)
    torch.testing.assert_close(criterion.balance.logs["kd"].exp(), 200 * kd, rtol=1e-3, atol=0)  # the minimum


def test_running_magnitudes_scale_every_term_to_the_size_of_the_first():
    criterion = Sum(0.3 * CrossEntropy() + 0.7 * Logits(), balance=RunningMagnitude(momentum=0.8)).double()
    sizes = None
    for seed in range(4):
        student, *rest = logits_and_labels(seed)
        ce, kd = ce_and_kd(student, *rest)
        factor = 0.0 if sizes is None else sizes[0] / sizes[1]
        by_hand = 0.3 * ce + 0.7 * factor * kd
        value = criterion(student, *rest)
        torch.testing.assert_close(value, by_hand)
        torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True) for x in (value, by_hand)))
        seen = torch.stack([ce, kd]).detach()
        sizes = seen if sizes is None else 0.8 * sizes + 0.2 * seen
    torch.testing.assert_close(criterion.balance.magnitudes, sizes)


def test_running_magnitudes_are_unchanged_in_evaluation_and_if_no_position_counts():
    criterion = Sum(CrossEntropy() + Logits(), balance=RunningMagnitude()).double()
    student, teacher, labels = logits_and_labels()
    criterion(student, teacher, labels)
    before = copy.deepcopy(criterion.state_dict())
    criterion(student, teacher, torch.full_like(labels, -100))
    with torch.no_grad():
        criterion(3 * student, teacher, labels)
    criterion.eval()(3 * student, teacher, labels)
    assert all(torch.equal(x, before[name]) for name, x in criterion.state_dict().items())
    again = Sum(CrossEntropy() + Logits(), balance=RunningMagnitude()).double()
    again.load_state_dict(before)
    values = [c.eval()(student, teacher, labels) for c in (again, criterion)]
    torch.testing.assert_close(*values)
    assert values[0] > ce_and_kd(student, teacher, labels)[0]


def test_a_distillation_trains_and_saves_the_parameters_of_a_balance():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, V)) for _ in range(2))
    criterion = Sum(CrossEntropy() + Logits() + Features(["0"], pairing="same"), balance=Uncertainty())
    model = kdloss.Distillation(student, teacher, criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = torch.randn(8, 3), torch.randint(0, V, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        model(x, labels=labels).loss.backward()
        optimizer.step()
    saved = {name: x for name, x in model.state_dict().items() if "balance" in name}
    assert len(saved) == 3
    assert all(x != 0 for x in saved.values())
    other = kdloss.Distillation(student, teacher, copy.deepcopy(criterion))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, labels=labels).loss, model(x, labels=labels).loss)


def test_the_loss_without_a_teacher_is_not_balanced():
    student, teacher = (nn.Linear(3, V) for _ in range(2))
    criterion = Sum(CrossEntropy() + Logits(), balance=Uncertainty())
    with torch.no_grad():
        criterion.balance.logs["ce"].fill_(2.0)
    x, labels = torch.randn(8, 3), torch.randint(0, V, (8,))
    out = kdloss.Distiller(teacher, criterion)(student, x, labels=labels, teach=False)
    torch.testing.assert_close(out.loss, F.cross_entropy(student(x), labels))


def test_a_multiple_of_a_balanced_recipe_is_balanced():
    student, *rest = logits_and_labels()
    ce, kd = ce_and_kd(student, *rest)
    balanced = Sum(kdloss.VanillaKD(temperature=1.0, alpha=0.5), balance=Uncertainty()).double()
    with torch.no_grad():
        balanced.balance.logs["kd"].fill_(1.0)
    e = torch.tensor(-1.0).double().exp()
    torch.testing.assert_close((2.0 * balanced)(student, *rest), ce + e * kd + 0.5)


def test_a_term_of_weight_zero_adds_no_penalty():
    student, *rest = logits_and_labels()
    criterion = Sum(CrossEntropy() + 0.0 * Logits(), balance=Uncertainty()).double()
    with torch.no_grad():
        criterion.balance.logs["kd"].fill_(5.0)
    torch.testing.assert_close(criterion(student, *rest), ce_and_kd(student, *rest)[0])


def test_invalid_balances_are_refused():
    with pytest.raises(ValueError, match="say it once"):
        Sum(CrossEntropy(), balance=Uncertainty()) + Sum(Logits(), balance=Uncertainty())
    with pytest.raises(ValueError, match="say it once"):
        Sum(CrossEntropy(), balance=Uncertainty()) + Logits()
    with pytest.raises(ValueError, match="say it once"):
        Sum(Sum(CrossEntropy(), balance=Uncertainty()), balance=Uncertainty())
    with pytest.raises(NotImplementedError, match="define factors"):
        Sum(CrossEntropy(), balance=Balance())(*logits_and_labels())
    with pytest.raises(TypeError, match="balance"):
        Sum(CrossEntropy(), balance=Uncertainty)
    with pytest.raises(ValueError, match="reduction='none'"):
        Sum(CrossEntropy(), balance=Uncertainty(), reduction="none")(*logits_and_labels())
