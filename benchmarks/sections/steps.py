"""Sections on full training steps: small batches, where overhead dominates, and features."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from measure import Row, Step, peak, peak_row, time_row
from sections.given import shape
from torch import Tensor

import kdloss


def small_batches(
    memory: str, shapes: tuple[tuple[int, int], ...] = ((32, 10), (128, 10), (128, 100), (128, 1000))
) -> Iterator[Row]:
    """`VanillaKD` on batches of image classifiers, and the time that `Distiller` and `Distillation` add."""
    import small

    for sizes in shapes:
        goal = 1.3 if sizes[0] == 128 and sizes[1] <= 100 else None
        said = f"{shape(*sizes)} fp32, uncompiled, against KL + CE by hand"
        yield Row("`VanillaKD`: time", said, small.ratio(*sizes), goal)
    for language, features, module in product((False, True), repeat=3):
        added = small.milliseconds(language=language, features=features, module=module)
        what = f"`{'Distillation' if module else 'Distiller'}`, `{'FeatureKD' if features else 'VanillaKD'}`"
        on = "GPT-2 of width 32, 2 × 16 tokens" if language else "a perceptron, 128 examples"
        yield Row(f"{what}: ms added to a step", f"{on}, uncompiled", added, 0.5 if language else 0.2)


def features(
    memory: str,
    blocks: int = 12,
    widths: tuple[int, int] = (256, 384),
    batch: tuple[int, int] = (4, 128),
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
        """Run the student twice, for its loss and for its features, and the full teacher."""
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


def cache(memory: str, rounds: int = 7) -> Iterator[Row]:
    """The speed of reading stored teachers."""
    import reads

    ours, mapped = reads.cache_reads(rounds)
    said = f"{reads.BATCH} × {reads.TOKENS} tokens, k = {reads.K}, in random order"
    yield Row("cache reads, million tokens a second", said, ours / 1e6, 4, least=True)
    yield Row("cache reads: rate", f"{said}, against numpy's memory map", ours / mapped)
