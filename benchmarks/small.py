"""Overhead of a step: criteria on small batches, and the time that `Distiller` and `Distillation` add to small models.

`python benchmarks/small.py` prints a table. One thread, CPU time, all ways in turn; medians of paired ratios and of
paired differences.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace as Output
from typing import Any

import recipes
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import kdloss

Step = Callable[[], Any]


def seconds(*steps: Step, rounds: int = 30, repeats: int = 20) -> list[list[float]]:
    """CPU seconds of each step in each round. Steps run in turn, after some warm-up runs."""
    for step in steps * 3:
        step()
    found: list[list[float]] = [[] for _ in steps]
    for k in range(rounds):
        for i in range(len(steps)) if k % 2 else reversed(range(len(steps))):
            start = time.process_time()
            for _ in range(repeats):
                steps[i]()
            found[i].append((time.process_time() - start) / repeats)
    return found


def ratio(batch: int, classes: int, ignored: bool = False) -> float:
    """The time of `VanillaKD`, forward and backward, over KL + CE by hand; `ignored` ignores half of the labels."""
    student, teacher = torch.randn(2, batch, classes)
    student, labels = student.clone().requires_grad_(), torch.randint(0, classes, (batch,))
    labels[::2] = -100 if ignored else labels[::2]

    def backward(criterion: Callable[..., Any]) -> Step:
        def step() -> None:
            criterion(student, teacher, labels).backward()
            student.grad = None

        return step

    plain = recipes.kl_ce_kept if ignored else recipes.kl_ce
    ours, theirs = seconds(backward(kdloss.VanillaKD(recipes.T, 0.5)), backward(plain))
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def classifier() -> nn.Module:
    """A perceptron with 20 inputs and 10 classes."""
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))


def gpt2(blocks: int) -> nn.Module:
    """A GPT-2 with width 32 and a vocabulary of 64."""
    shape = {"n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    drop = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=blocks, **shape, **drop))


def milliseconds(*, language: bool = False, features: bool = False, module: bool = False) -> float:
    """Milliseconds that `Distiller` (or `Distillation`, for `module`) adds to a step by hand, forward and backward.

    The models are perceptrons on 128 examples, or GPT-2s on 2 x 16 tokens. The criterion is `VanillaKD`, or `FeatureKD`
    with one pair.
    """
    student, teacher = (gpt2(2), gpt2(4).eval()) if language else (classifier(), classifier().eval())
    tokens = torch.randint(0, 64, (2, 16))
    x, labels = torch.randn(128, 20), tokens if language else torch.randint(0, 10, (128,))
    args, batch = ((), {"input_ids": tokens}) if language else ((x,), {})
    first: Any = 0 if language else "0"

    def criterion(pair: Any) -> nn.Module:
        return kdloss.FeatureKD(pairing=[pair], causal=language) if features else kdloss.VanillaKD(causal=language)

    def ran(model: nn.Module) -> Any:
        if language:
            return model(**batch, use_cache=False, output_hidden_states=features)
        hidden = model[0](x)
        return Output(logits=model[2](model[1](hidden)), hidden_states=[x, hidden, hidden])

    def by_hand() -> None:
        with torch.no_grad():
            target = ran(teacher)
        alone(ran(student), target, labels).backward()
        student.zero_grad()

    alone = criterion((0, 0))
    distill = kdloss.Distiller(teacher, criterion((first, first))).prepare(student, *args, **batch, labels=labels)
    distillation = kdloss.Distillation(student, teacher, criterion((first, first)))

    def ours() -> None:
        out = distillation(*args, labels=labels, **batch) if module else distill(student, *args, labels=labels, **batch)
        out.loss.backward()
        student.zero_grad()

    found, hand = seconds(ours, by_hand, repeats=5)
    return 1000 * statistics.median(a - b for a, b in zip(found, hand, strict=True))


def main() -> None:
    """Print the table, row by row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| | ours | at most |\n|---|---|---|")
    for batch, classes in ((32, 10), (128, 10), (128, 100), (128, 1000)):
        print(f"| [{batch}, {classes}] VanillaKD against KL + CE by hand | {ratio(batch, classes):.2f} | 1.3 |")
    print(f"| [128, 10], half of them ignored | {ratio(128, 10, ignored=True):.2f} | |")
    for language in (False, True):
        for features in (False, True):
            for module in (False, True):
                added = milliseconds(language=language, features=features, module=module)
                what = f"{'Distillation' if module else 'Distiller'}, {'FeatureKD' if features else 'VanillaKD'}"
                models = "GPT-2, 2 × 16 tokens" if language else "perceptron, 128 examples"
                print(f"| {what}, {models}: ms added | {added:.2f} | {0.5 if language else 0.2} |")


if __name__ == "__main__":
    main()
