"""The logger "kdloss" warns once of what a training loop forgets; a correct loop gets no warning."""

import logging
from itertools import chain

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import kdloss

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])


def net(width):
    return nn.Sequential(nn.Sequential(nn.Linear(5, width), nn.Tanh()), nn.Linear(width, 3))


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="kdloss")
    return lambda: [record.getMessage() for record in caplog.records]


def features():
    return kdloss.CrossEntropy() + kdloss.Features(["0"], pairing="same")


def distilled(criterion):
    """A student and a distiller prepared for it, for a hand-written loop."""
    student = net(6)
    return student, kdloss.Distiller(net(8), criterion).prepare(student, X)


def test_an_optimizer_without_the_projections_causes_one_warning(warned):
    student, distill = distilled(criterion := features())
    before = [p.clone() for p in criterion.parameters()]
    optimizer = AdamW(student.parameters())
    for _ in range(3):
        distill(student, X, labels=Y).loss.backward()
        optimizer.step()
        student.zero_grad()
        criterion.zero_grad()
    (message,) = warned()
    assert "no optimizer has the criterion's" in message
    assert "terms.feature.projections.0.weight" in message
    assert "AdamW([*student.parameters(), *criterion.parameters()])" in message
    assert all(torch.equal(p, q) for p, q in zip(criterion.parameters(), before, strict=True)), "as the message says"


@pytest.mark.parametrize("optimizers", ["one for both", "one for each", "of the module"])
def test_a_loop_that_trains_and_zeroes_everything_gets_no_warning(optimizers, warned):
    student, distill = distilled(criterion := features())
    model = kdloss.Distillation(student, distill.teachers[0], criterion)
    groups = {
        "one for both": [chain(student.parameters(), criterion.parameters())],
        "one for each": [student.parameters(), criterion.parameters()],
        "of the module": [model.parameters()],
    }
    every = [SGD(list(group), lr=0.1) for group in groups[optimizers]]
    for _ in range(3):
        loss = model(X, labels=Y).loss if optimizers == "of the module" else distill(student, X, labels=Y).loss
        loss.backward()
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad()
    assert warned() == []


def test_projections_whose_gradients_are_never_zeroed_cause_one_warning(warned):
    student, distill = distilled(criterion := features())
    optimizer = SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    for _ in range(3):
        distill(student, X, labels=Y).loss.backward()
        optimizer.step()
        student.zero_grad()  # the loop doesn't know of the criterion's parameters
    (message,) = warned()
    assert "still have gradients of the step before" in message
    assert "optimizer.zero_grad()" in message


def test_gradients_accumulated_over_micro_batches_cause_no_warning(warned):
    student, distill = distilled(criterion := features())
    optimizer = SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    for micro in range(6):
        distill(student, X, labels=Y).loss.backward()
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert warned() == []


SCHEDULED = {
    "weight": lambda: kdloss.CrossEntropy() + kdloss.schedules.linear(0.1, 1.0, steps=9) * kdloss.Logits(),
    "temperature": lambda: kdloss.VanillaKD(temperature=lambda step: 4.0 - 0.1 * step),
    "alpha": lambda: kdloss.VanillaKD(alpha=kdloss.schedules.cosine(0.1, 0.9, steps=9)),
}


@pytest.mark.parametrize("scheduled", SCHEDULED)
def test_a_forgotten_advance_causes_one_warning_if_something_is_scheduled(scheduled, warned):
    student, distill = distilled(criterion := SCHEDULED[scheduled]())
    optimizer = SGD(student.parameters(), lr=0.1)
    for _ in range(4):
        distill(student, X, labels=Y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (message,) = warned()
    assert "criterion.advance() after optimizer.step()" in message
    assert criterion.step == 0


@pytest.mark.parametrize("scheduled", [*SCHEDULED, None])
def test_a_loop_that_calls_advance_or_has_no_schedule_gets_no_warning(scheduled, warned):
    student, distill = distilled(criterion := SCHEDULED[scheduled]() if scheduled else kdloss.VanillaKD())
    optimizer = SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(2):  # micro-batches
            distill(student, X, labels=Y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduled:
            criterion.advance()
        with torch.no_grad():
            distill(student, X, labels=Y)
    assert warned() == []
