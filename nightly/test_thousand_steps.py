"""Nothing leaks: after 1000 steps there are as many hooks, tensors and bytes as after a few."""

import gc
import tracemalloc
from typing import Any, NamedTuple

import pytest
import torch
from families import VOCAB, build
from parts.memory import LiveTensors
from torch import Tensor, nn

import kdloss

STEPS, FIRST = 1000, 20


class Net(nn.Module):
    """A classifier with two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return logits


class Held(NamedTuple):
    """Counts of everything that is alive between steps."""

    hooks: int
    tensors: int
    bytes_of_tensors: int
    objects: int


def hooks(*models: nn.Module) -> int:
    """The number of hooks in all modules."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return sum(len(getattr(module, kind)) for model in models for module in model.modules() for kind in kinds)


def held(live: LiveTensors, *models: nn.Module) -> Held:
    """Collect garbage, then count."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(x), Tensor) for x in objects)
    return Held(hooks(*models), tensors, live.now, len(objects))


def of_classifier() -> tuple[kdloss.Distillation, nn.Module, Any]:
    """An MLP with features of another width, logits and labels."""
    student, teacher = Net(8), Net(16)
    features = kdloss.Features(pairing=[("first", "first"), ("second", "second")])
    criterion = 0.5 * kdloss.CrossEntropy() + kdloss.Logits(temperature=2.0) + features
    model = kdloss.Distillation(student, teacher, criterion)

    def batch() -> dict[str, Tensor]:
        return {"x": torch.randn(4, 6), "labels": torch.randint(0, 5, (4,))}

    model.prepare(**batch())
    return model, teacher, batch


def of_language_model() -> tuple[kdloss.Distillation, nn.Module, Any]:
    """A tiny GPT-2 with the same terms, a schedule and ignored labels."""
    student, teacher = build("gpt2", depth=2), build("gpt2", width=24, depth=3, seed=1)
    weight = kdloss.schedules.linear(0.1, 1.0, steps=100)
    criterion = 0.5 * kdloss.CrossEntropy() + weight * kdloss.Logits(temperature=2.0) + kdloss.Features("last")
    model = kdloss.Distillation(student, teacher, criterion)

    def batch() -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCAB, (2, 8))
        labels = tokens.masked_fill(torch.rand(2, 8) < 0.2, -100)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    model.prepare(**batch())
    return model, teacher, batch


@pytest.mark.parametrize("of", [of_classifier, of_language_model])
def test_nothing_is_left_behind_by_a_thousand_steps(of):
    torch.manual_seed(0)
    model, teacher, batch = of()
    assert any("projection" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = hooks(model, teacher)

    def steps(number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
            model.criterion.advance()

    with LiveTensors() as live:
        steps(FIRST)
        early = held(live, model, teacher)
        tracemalloc.start()
        steps(STEPS // 2)
        first, middle = tracemalloc.get_traced_memory()[0], held(live, model, teacher)
        steps(STEPS - STEPS // 2)
        late, second = held(live, model, teacher), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert late[:3] == middle[:3] == early[:3]
    assert early.hooks == before
    assert late.objects <= middle.objects + 50
    assert second <= first + 50_000
