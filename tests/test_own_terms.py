"""Custom terms, sums and criteria under `Distiller`, and which models each term makes it run."""

import logging

import pytest
import torch
import torch.nn.functional as F
from families import build
from stepping import Steps, asked, kl, texts
from terms import Batch, by_hand, close, made
from torch import nn

import kdloss
from kdloss import CrossEntropy, Distillation, Distiller, Features, LazyLogits, Logits, Sum, Task
from kdloss.schedules import linear
from kdloss.terms import Reads, Term

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def pair(width=16):
    """Return a causal student of two blocks and a teacher of four, in float64."""
    return build("gpt2", width=16, depth=2).double(), build("gpt2", width=width, depth=4, seed=1).double()


def counted(batch):
    """Return the mask of the logits whose next token is a label."""
    return (batch["labels"][:, 1:] != -100) & batch["attention_mask"][:, 1:].bool()


def ce(model, batch):
    """Compute the causal cross-entropy in plain torch."""
    keep, logits = counted(batch), asked(model, batch).logits[:, :-1]
    return F.cross_entropy(logits[keep], batch["labels"][:, 1:][keep])


def assert_same(loss, expected, student, rtol=1e-9):
    """Assert equal values, and equal gradients with respect to the student's parameters."""
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=rtol, atol=1e-12)
    for ours, other in zip(
        *(torch.autograd.grad(x, [*student.parameters()], allow_unused=True) for x in (loss, expected)), strict=True
    ):
        zero = torch.zeros(())
        torch.testing.assert_close(
            *(zero if g is None or not g.any() else g for g in (ours, other)), rtol=rtol, atol=1e-12
        )


class Gap(Term):
    """The distance between the student's first block, scaled by a learned number, and the teacher's second block."""

    def __init__(self):
        super().__init__(name="gap", teacher=0)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def reads(self):
        return Reads(logits="none", teacher_output=False, pairs=[(0, 1, 1.0)])

    def loss(self, step):
        h, t = step.where.take(step.student[0]), step.where.take(step.teacher[1])
        return (self.scale * h - t).square().mean(-1)


@pytest.mark.parametrize("with_ce", [False, True])
def test_a_custom_term_gets_captured_features_an_early_stop_and_lazy_logits(with_ce):
    (student, teacher), batch, gap = pair(), texts(labelled=0.8), Gap()
    model = Distillation(student, teacher, CrossEntropy() + 0.5 * gap if with_ce else 0.5 * gap)
    with Steps() as steps:
        out = model(**batch)
    assert steps.ran[student] == 1
    assert [steps.ran[block] for block in teacher.transformer.h] == [1, 1, 0, 0], (
        "the teacher stops after the last block that is read"
    )
    assert isinstance(out.output.logits, LazyLogits)
    h, t = (asked(m, batch).hidden_states[i][:, :-1] for m, i in ((student, 1), (teacher, 2)))
    expected = 0.5 * (gap.scale * h - t.detach()).square().mean(-1)[counted(batch)].mean()
    torch.testing.assert_close(
        *torch.autograd.grad(out.loss, gap.scale, retain_graph=True),
        *torch.autograd.grad(expected, gap.scale, retain_graph=True),
    )
    assert any(p is gap.scale for p in model.parameters())
    assert_same(out.loss, expected + (ce(student, batch) if with_ce else 0), student)


def test_a_custom_term_that_does_not_say_what_it_reads_gets_full_outputs():
    class Spread(Term):
        def loss(self, step):
            assert step.output.logits.std(-1).shape == (2, 8)
            return step.where.take(step.teacher.output.logits).std(-1) - step.where.take(step.output.logits).std(-1)

    (student, teacher), batch = pair(), texts(labelled=0.8)
    out = Distiller(teacher, 1.0 * Spread(name="spread", teacher=0))(student, **batch)
    s, t = (asked(m, batch).logits[:, :-1].std(-1)[counted(batch)].mean() for m in (student, teacher))
    assert_same(out.loss, t.detach() - s, student)
    assert list(out.components) == ["spread"]


@pytest.mark.parametrize(("reads", "said"), [((), "reads no teacher"), ([0, 1], "reads several teachers")])
def test_a_custom_term_without_a_single_teacher_has_no_teacher_logits(reads, said):
    class Reader(Term):
        def loss(self, step):
            return step.teacher_logits().sum(-1)

    logits = torch.zeros(2, 3)
    criterion = Logits(teacher="all") + Reader(name="own", teacher=reads)
    with pytest.raises(ValueError, match=f"{said}.*teacher=0"):
        criterion(logits, [logits, logits])


@pytest.mark.parametrize("attribute", ["task", "take", "logits", "divergence", "weight", "temperature"])
def test_a_custom_term_may_have_attributes_of_any_name(attribute):
    class Custom(Term):
        def __init__(self):
            super().__init__(name="own")
            setattr(self, attribute, "sst2")

        def loss(self, step):
            return step.where.take(step.student_logits()).softmax(-1).square().sum(-1)

    batch = Batch()
    close((made("ce") + Custom())(*batch.args()), (by_hand("ce", batch) + by_hand("own", batch)).mean(), batch)


@pytest.mark.parametrize("base", [CrossEntropy, Logits])
def test_a_loss_that_a_subclass_overrides_is_the_one_that_is_used(base):
    class Doubled(base):
        def loss(self, step):
            return 2 * super().loss(step)

    batch, name = Batch(), {CrossEntropy: "ce", Logits: "kd"}[base]
    term = Doubled(**({"temperature": 2.0} if base is Logits else {}))
    close((1.0 * term)(*batch.args()), 2 * by_hand(name, batch).mean(), batch)


class Halved(Sum):
    """A custom sum."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


def test_a_custom_sum_that_overrides_forward_gets_lazy_logits():
    (student, teacher), batch = pair(24), texts(labelled=0.8)
    out = Distiller(teacher, Halved(CrossEntropy(), Logits(temperature=2.0)))(student, **batch)
    assert isinstance(out.output.logits, LazyLogits)
    s, t = (asked(m, batch).logits[:, :-1] for m in (student, teacher))
    assert_same(out.loss, (ce(student, batch) + kl(s, t.detach(), 2.0)[counted(batch)].mean()) / 2, student)
    assert list(out.components) == ["ce", "kd"]


class Foreign(nn.Module):
    """A custom criterion that is not built from classes of this library."""

    def forward(self, student, teacher, labels, *, mask, num_items_in_batch):
        values = (student.output.logits - teacher.output.logits).square().mean(-1)
        return values[mask].sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch)


def test_a_foreign_criterion_works_and_one_warning_says_what_it_lacks(caplog):
    (student, teacher), batch = pair(24), texts()
    with caplog.at_level(logging.WARNING, logger="kdloss"):
        model = Distillation(student, teacher, Foreign())
        outs = [model(**batch, num_items_in_batch=n) for n in (None, 20, 20)]
    (warning,) = caplog.records
    assert (warning.name, warning.levelname) == ("kdloss", "WARNING")
    for word in ("Foreign", "`plan`", "full logits are made", "kdloss.Task(function)", "kdloss.terms.Term"):
        assert word in warning.getMessage()
    s, t = (asked(m, batch).logits for m in (student, teacher))
    token = batch["attention_mask"].bool()
    values = (s - t.detach()).square().mean(-1)[token]
    assert_same(outs[1].loss, values.sum() / 20, student)
    assert outs[0].components == {}
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kdloss"):
        Distillation(student, teacher, 1.0 * Task(lambda output, labels: output.logits.mean()) + Logits())
    assert not caplog.records


# -- terms of weight zero cost nothing --


@pytest.mark.parametrize("zero", [0.0, linear(0.0, 1.0, steps=4), lambda step: step / 4], ids=["0", "linear", "lambda"])
def test_a_teacher_whose_terms_have_weight_zero_does_not_run_and_its_projections_get_zero_gradients(zero):
    calls = []

    def distance(student, teacher):
        calls.append(1)
        return (student - teacher).square().mean(-1)

    (student, teacher), batch = pair(24), texts(labelled=0.8)
    criterion = CrossEntropy() + zero * (Features("all", distance=distance) + 2.0 * Logits())
    model = Distillation(student, teacher, criterion).double()
    with Steps() as steps:
        out = model(**batch)
    assert (steps.ran[student], steps.ran[teacher], calls) == (1, 0, [])
    assert list(out.components) == ["ce"]
    out.loss.backward()
    projections = list(criterion.terms["feature"].parameters())
    assert len(projections) == 4
    assert all(p.grad is not None and not p.grad.any() for p in projections)
    assert_same(model(**batch).loss, ce(student, batch), student)
    criterion.advance()
    with Steps() as steps:
        model(**batch).loss.backward()
    on = zero != 0.0
    assert (steps.ran[teacher], len(calls)) == ((1, 2) if on else (0, 0))
    assert all(bool(p.grad.any()) == on for p in projections)


def test_of_two_teachers_the_one_with_weight_zero_does_not_run():
    (student, first), second, batch = pair(24), build("gpt2", 16, 3, seed=2).double(), texts(labelled=0.8)
    criterion = CrossEntropy() + 0.0 * Logits(name="first") + 0.5 * Logits(teacher=1, name="second")
    with Steps() as steps:
        out = Distiller([first, second], criterion)(student, **batch)
    assert [steps.ran[m] for m in (student, first, second)] == [1, 0, 1]
    s, t = (asked(m, batch).logits[:, :-1] for m in (student, second))
    assert_same(out.loss, ce(student, batch) + 0.5 * kl(s, t.detach(), 1.0)[counted(batch)].mean(), student)


def test_two_terms_of_one_teacher_with_weight_one_half_run_the_models_once_and_equal_one_term():
    (student, teacher), batch = pair(24), texts(labelled=0.8)
    halves = 0.5 * Logits(name="one") + 0.5 * Logits(name="another")
    with Steps() as steps:
        out = Distiller(teacher, halves)(student, **batch)
    assert (steps.ran[student], steps.ran[teacher]) == (1, 1)
    assert torch.equal(out.loss, Distiller(teacher, 1.0 * Logits())(student, **batch).loss)


def test_distillation_trains_a_learned_weight_and_saves_it_with_the_step():
    (student, teacher), batch = pair(), texts(labelled=0.8)
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    model = Distillation(student, teacher, CrossEntropy() + linear(0.0, 1.0, steps=2) * (weight * Logits()))
    assert any(p is weight for p in model.parameters())
    with Steps() as steps:
        model(**batch).loss.backward()
    assert steps.ran[teacher] == 0, "the learned weight is multiplied by 0"
    assert weight.grad == 0
    model.criterion.advance()
    out = model(**batch)
    out.loss.backward()
    torch.testing.assert_close(weight.grad, 0.5 * out.components["kd"])
    saved = {name for name in model.state_dict() if not name.startswith("student.")}
    assert saved == {"criterion.step", "criterion.weights.kd.learned.0"}
    assert isinstance(model.criterion, kdloss.Sum)
