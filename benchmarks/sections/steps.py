"""Whole steps: small batches, where overhead is all there is, and models that are trained on features."""

from collections.abc import Callable, Iterator
from typing import Any

import recipes
import torch
from measure import Row, Step, backward, paired, peak, peak_row, time_row
from sections.given import logits, shape
from torch import Tensor

import kdloss


def criteria(
    memory: str, shapes: tuple[tuple[int, int], ...] = ((32, 10), (128, 10), (128, 100), (128, 1000))
) -> Iterator[Row]:
    """`VanillaKD` on the batches of image classifiers."""
    goals = {(128, 10): 1.3, (128, 100): 1.3}
    for sizes in shapes:
        data = logits(*sizes)
        steps = backward(kdloss.VanillaKD(recipes.T, 0.5), *data), backward(recipes.kl_ce, *data)
        many = [repeated(step) for step in steps]
        ratio, ms = paired(*many)
        said = f"{shape(*sizes)} fp32, uncompiled, memory {memory}, against KL + CE by hand"
        yield Row("`VanillaKD`: time", said, ratio, goals.get(sizes), f"{ms / 50:.3g} ms")


def repeated(step: Step, times: int = 50) -> Step:
    """A step that is too short for the clock, many times."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def features(
    memory: str,
    blocks: int = 12,
    widths: tuple[int, int] = (256, 384),
    batch: tuple[int, int] = (8, 128),
    vocab: int = 50_257,
) -> Iterator[Row]:
    """A GPT-2-shaped pair."""
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": vocab, "n_positions": batch[1]}
    config = {"n_layer": blocks, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **special}
    student, teacher = (GPT2LMHeadModel(GPT2Config(n_embd=d, n_head=d // 64 or 1, **config)) for d in widths)
    teacher = teacher.eval().requires_grad_(False)
    tokens = torch.randint(0, vocab, batch)
    inputs = {"input_ids": tokens, "labels": tokens}
    wider = torch.nn.Linear(*widths)
    chosen = kdloss.layers.select("auto", blocks)

    def step(loss: Callable[[], Tensor], trained: torch.nn.Module) -> Step:
        def run() -> None:
            loss().backward()
            trained.zero_grad()

        return run

    def distilled(criterion: Any) -> Step:
        model = kdloss.Distillation(student, teacher, criterion)
        return step(lambda: model(**inputs).loss, model)

    def old_way() -> Tensor:
        """The student once for its loss and once for its features, the teacher in full."""
        ce = student(**inputs).loss
        with torch.no_grad():
            t = teacher(**inputs, output_hidden_states=True).hidden_states
        s = student(**inputs, output_hidden_states=True).hidden_states
        gaps = [torch.nn.functional.mse_loss(wider(s[i + 1]), t[i + 1]) for i in chosen]
        return 0.3 * ce + 0.7 * torch.stack(gaps).mean()

    vanilla, feature = distilled(kdloss.VanillaKD()), distilled(kdloss.FeatureKD())
    both = distilled(kdloss.FeatureKD(logit_weight=1.0))
    said = (
        f"GPT-2 shape, {blocks} blocks, D = {widths[0]} and {widths[1]}, {shape(*batch)} tokens, fp32, uncompiled, "
        f"memory {memory}, against"
    )
    yield time_row("`FeatureKD`", f"{said} `VanillaKD`", feature, vanilla, 0.95)
    yield time_row("`FeatureKD`", f"{said} student twice and teacher in full", feature, step(old_way, student), 0.65)
    yield time_row("`FeatureKD` with the output term", f"{said} `VanillaKD`", both, vanilla, 1.05)
    base = peak(vanilla)
    yield peak_row("`FeatureKD`", f"{said} `VanillaKD`", feature, base, 1.05)
    yield peak_row("`FeatureKD` with the output term", f"{said} `VanillaKD`", both, base, 1.05)


def overhead(memory: str) -> Iterator[Row]:
    """What `Distiller` adds to a step: wired to `small.py`."""
    import small

    yield from small.rows(memory)


def cache(memory: str) -> Iterator[Row]:
    """Tokens a second read from a cache: wired to `reads.py`."""
    import reads

    rate = reads.cache_reads()
    yield Row("cache reads, million tokens a second", "8 × 256 tokens, k = 64", rate / 1e6, 4, least=True)
