"""Recipes with mixed and missing labels, with schedules, and with a stored teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import build
from safetensors.torch import load_file, save_file
from stepping import Steps, asked, holds_to, kl, recipe, texts
from torch import nn
from torch.optim import SGD

from kdloss import CrossEntropy, Distillation, Features, Logits, TopKLogits, VanillaKD
from kdloss.schedules import linear, warmup

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def mlp(width, seed=0):
    """Linear modules "0" and "2" of one width, then five classes."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)]
    return nn.Sequential(*layers).double()


def points(examples=6):
    """Random inputs and a class for each example."""
    return torch.randn(examples, 4).double(), torch.randint(0, 5, (examples,))


# -- mixup: labels that are mixed between classes --


@recipe
def mixup(student, teacher, images, labels, share):
    model = Distillation(student, teacher, VanillaKD(temperature=2.0, alpha=0.3))
    optimizer = SGD(model.parameters(), lr=0.1)
    soft, order = F.one_hot(labels, 5).to(images.dtype), torch.randperm(len(images))
    images, soft = (share * x + (1 - share) * x[order] for x in (images, soft))
    model(images, labels=soft).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_mixup_learns_from_mixed_labels_and_from_the_teacher(share):
    (images, labels), student, teacher = points(), mlp(8), mlp(12, seed=1)
    torch.manual_seed(3)
    with Steps() as steps:
        mixup(student, teacher, images, labels, share)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        torch.manual_seed(3)
        order = torch.randperm(6)
        mixed = share * images + (1 - share) * images[order]
        s, t = before.student(mixed), teacher(mixed).detach()
        own, other = (F.cross_entropy(s, y, reduction="none") for y in (labels, labels[order]))
        return 0.3 * (share * own + (1 - share) * other).mean() + 0.7 * kl(s, t, 2.0).mean()

    holds_to(steps, loss)


# -- examples without labels learn only from the teacher --


@recipe
def partly_labelled(student, teacher, images, labels):
    model = Distillation(student, teacher, CrossEntropy() + 0.5 * Logits(temperature=2.0, positions="mask"))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("labelled", [[0, 2], [3], [], [0, 1, 2, 3, 4, 5]])
def test_unlabelled_examples_learn_from_the_teacher_and_labelled_examples_from_both(labelled):
    (images, classes), student, teacher = points(), mlp(8), mlp(12, seed=1)
    labels = torch.full_like(classes, -100)
    labels[labelled] = classes[labelled]
    with Steps() as steps:
        partly_labelled(student, teacher, images, labels)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        s, t = before.student(images), teacher(images).detach()
        ce = F.cross_entropy(s[labelled], classes[labelled]) if labelled else 0
        return ce + 0.5 * kl(s, t, 2.0).mean()

    holds_to(steps, loss)


@recipe
def partly_labelled_texts(student, teacher, batch):
    model = Distillation(student, teacher, CrossEntropy() + 0.5 * Logits(temperature=2.0, positions="mask"))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


def test_unlabelled_texts_of_a_causal_model_learn_from_the_teacher_up_to_their_padding():
    student, teacher, batch = build("gpt2", depth=2).double(), build("gpt2", 24, 3, seed=1).double(), texts()
    batch["labels"][1] = -100
    with Steps() as steps:
        partly_labelled_texts(student, teacher, batch)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        s, t = (asked(m, batch).logits[:, :-1] for m in (before.student, teacher))
        token, labels = batch["attention_mask"][:, 1:].bool(), batch["labels"][:, 1:]
        ce = F.cross_entropy(s[labels != -100], labels[labels != -100])
        return ce + 0.5 * kl(s, t.detach(), 2.0)[token].mean()

    holds_to(steps, loss)


# -- a temperature that falls and a weight that warms up --


def annealed(student, teacher):
    """The model of a run, and of the run that resumes it."""
    criterion = CrossEntropy() + Logits(temperature=linear(4.0, 1.0, steps=3))
    criterion += warmup(2, 0.5) * Features(["2"], pairing="same")
    return Distillation(student, teacher, criterion).prepare(torch.zeros(1, 4).double()).double()


@recipe
def annealing(model, batches):
    optimizer = SGD(model.parameters(), lr=0.1)
    for images, labels in batches:
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
        model.criterion.advance()


def test_a_temperature_falls_and_a_weight_warms_up_with_the_steps():
    student, teacher, batches = mlp(8), mlp(12, seed=1), [points() for _ in range(5)]
    model = annealed(student, teacher)
    with Steps() as steps:
        annealing(model, batches)
    assert steps.ran[student] == steps.ran[teacher] == 5
    assert model.criterion.step == 5
    after = [*steps.before[1:], model]
    temperatures, weights = [4.0, 3.0, 2.0, 1.0, 1.0], [0.0, 0.25, 0.5, 0.5, 0.5]
    for k, (images, labels) in enumerate(batches):
        before = steps.before[k]
        hidden, teacher_hidden = (m[:3](images) for m in (before.student, teacher))
        s, t = before.student(images), teacher(images).detach()
        project = before.criterion.terms["feature"].projections["2"]
        loss = F.cross_entropy(s, labels) + kl(s, t, temperatures[k]).mean()
        loss = loss + weights[k] * (project(hidden) - teacher_hidden.detach()).square().mean()
        torch.testing.assert_close(steps.outs[k].loss.detach(), loss.detach(), rtol=1e-12, atol=0)
        slopes = torch.autograd.grad(loss, [*before.parameters()])
        for old, slope, new in zip(before.parameters(), slopes, after[k].parameters(), strict=True):
            torch.testing.assert_close(new.detach(), old.detach() - 0.1 * slope, rtol=1e-10, atol=1e-14)
        assert ("feature" in steps.outs[k].components) == (k > 0)


def test_a_run_resumed_in_the_middle_equals_the_uninterrupted_run(tmp_path):
    teacher, batches = mlp(12, seed=1), [points() for _ in range(5)]
    model = annealed(mlp(8), teacher)
    with Steps() as uninterrupted:
        annealing(model, batches)
    interrupted = annealed(mlp(8), teacher)
    interrupted.load_state_dict(uninterrupted.before[0].state_dict())
    with Steps() as first:
        annealing(interrupted, batches[:2])
    save_file(interrupted.state_dict(), tmp_path / "step.safetensors")
    resumed = annealed(mlp(8, seed=5), teacher)
    resumed.load_state_dict(load_file(tmp_path / "step.safetensors"))
    assert resumed.criterion.step == 2
    with Steps() as second:
        annealing(resumed, batches[2:])
    losses = [out.loss.item() for out in uninterrupted.outs]
    assert [out.loss.item() for out in (*first.outs, *second.outs)] == losses
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_step_is_saved_as_one_integer_on_the_cpu_whatever_the_device():
    criterion = VanillaKD(temperature=linear(4.0, 1.0, steps=3))
    criterion.advance()
    for place in ("cpu", "meta"):
        with torch.device(place):  # as after torch.set_default_device("cuda")
            step = criterion.to(place).state_dict()["step"]
        assert (step.device.type, step.shape, step.dtype) == ("cpu", (), torch.int64)
        assert step == 1
    assert "step" not in VanillaKD().state_dict(), "nothing moves there"
    with pytest.raises(RuntimeError, match="step"):
        copy.deepcopy(criterion).load_state_dict({})


# -- a stored teacher with its most probable classes only, and a live teacher --


@recipe
def stored_and_live(student, live, batch, topk):
    criterion = 0.2 * CrossEntropy() + 0.5 * Logits(temperature=2.0, name="stored")
    criterion += 0.3 * Logits(temperature=2.0, teacher=1, name="live")
    model = Distillation(student, [None, live], criterion)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch, teacher=topk).loss.backward()
    optimizer.step()


def test_a_stored_top_k_teacher_and_a_live_teacher_are_combined():
    student, live, batch = build("gpt2", depth=2).double(), build("gpt2", 24, 3, seed=1).double(), texts(labelled=0.9)
    stored = 3 * torch.randn(2, 8, 61).double()
    with Steps() as steps:
        stored_and_live(student, live, batch, TopKLogits.of(stored, 5, temperature=2.0))
    assert steps.ran[student] == steps.ran[live] == 1

    def loss(before):
        s, t = (asked(m, batch).logits[:, :-1] for m in (before.student, live))
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        p, q = ((z / 2).softmax(-1) for z in (stored[:, :-1], s))
        top = p.topk(5, -1).indices
        p, q = (x.gather(-1, top) for x in (p, q))  # the five classes; all others are one more class
        stored_kl = (p * (p / q).log()).sum(-1) + (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
        ce = F.cross_entropy(s[counted], labels[counted])
        return 0.2 * ce + 0.5 * 4 * stored_kl[counted].mean() + 0.3 * kl(s, t.detach(), 2.0)[counted].mean()

    holds_to(steps, loss)
    assert list(steps.outs[0].components) == ["ce", "stored", "live"]
