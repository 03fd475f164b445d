"""Our losses against the plain PyTorch recipe, as ratios, in one table: `make bench`.

One thread, CPU time, both ways in turn, medians of paired ratios; peak memory counts the bytes of every
living tensor beyond what the step was given. Under five minutes.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recipes
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1] / "applications"))

from parts.memory import LiveTensors

import kdloss

Step = Callable[[], Any]
KL = kdloss.VanillaKD(recipes.T, 0.0)
BOTH = kdloss.VanillaKD(recipes.T, 0.5)


def time_ratio(ours: Step, plain: Step, rounds: int = 3) -> float:
    """Median of ours / plain in CPU time, taken in turn after a first run of each."""
    ours(), plain()
    ratios = []
    for k in range(rounds):
        times = {}
        for step in (ours, plain) if k % 2 else (plain, ours):
            start = time.process_time()
            step()
            times[step] = time.process_time() - start
        ratios.append(times[ours] / times[plain])
    return statistics.median(ratios)


def peak(step: Step, *given: Any) -> int:
    """Bytes alive at the peak beyond the given tensors."""
    with LiveTensors() as live:
        for tensor in leaves(given):
            live.count(tensor.untyped_storage())
        before = live.now
        step()
    return live.peak - before


def leaves(given: Sequence[Any]) -> list[Tensor]:
    """The tensors behind logits of any kind."""
    found = []
    for x in given:
        found += [x] if isinstance(x, Tensor) else [t for t in vars(x).values() if isinstance(t, Tensor)]
    return found


def backward(loss: Callable[..., Tensor], *given: Any) -> Step:
    """A step: value and gradients, which are thrown away."""

    def step() -> None:
        loss(*given).backward()
        for tensor in leaves(given):
            tensor.grad = None

    return step


def dense(recipe: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A recipe on logits, for hidden states and heads."""
    return lambda student, teacher, *rest: recipe(student.dense(), teacher.dense(), *rest)


def logits(tokens: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels."""
    student, teacher = (3 * torch.randn(2, tokens, vocab)).to(dtype)
    return student.clone().requires_grad_(), teacher, torch.randint(0, vocab, (tokens,))


def lazy(tokens: int, vocab: int, width: int, teacher_width: int) -> tuple[Any, Any, Tensor]:
    """The same as hidden states and heads."""
    sides = []
    for size in (width, teacher_width):
        sides.append(kdloss.LazyLogits(torch.randn(tokens, size), torch.randn(vocab, size) / size**0.5))
    for tensor in leaves(sides[:1]):
        tensor.requires_grad_()
    return sides[0], sides[1], torch.randint(0, vocab, (tokens,))


def report(name: str, ratio: float, at_most: float | None = None) -> None:
    """One row of the table."""
    print(f"| {name} | {ratio:.3g} | {'' if at_most is None else f'{at_most:.3g}'} |", flush=True)


def given_logits() -> None:
    """256 x 128 256 logits in float32."""
    what, data = "256 × 128 256 logits", logits(256, 128_256)
    plain = peak(backward(recipes.kl, *data), *data)
    report(f"{what}, KL: peak", peak(backward(KL, *data), *data) / plain, 0.23)
    spare = [data[0].detach().clone().requires_grad_(), *data[1:]]
    overwriting = kdloss.VanillaKD(recipes.T, 0.0, overwrite_logits=True)
    report(f"{what}, KL, overwriting them: peak", peak(backward(overwriting, *spare), *spare) / plain, 0.02)
    report(f"{what}, KL: time", time_ratio(backward(KL, *data), backward(recipes.kl, *data)))
    report(f"{what}, KL + CE: time", time_ratio(backward(BOTH, *data), backward(recipes.kl_ce, *data)), 0.5)
    ours = backward(kdloss.VanillaKD(recipes.T, 0.0, divergence=kdloss.divergences.jsd), *data)
    plain_jsd = backward(recipes.jsd, *data)
    report(f"{what}, JSD(0.5): peak", peak(ours, *data) / peak(plain_jsd, *data), 0.09)
    report(f"{what}, JSD(0.5): time", time_ratio(ours, plain_jsd), 0.4)
    kept = kdloss.TopKLogits.of(data[1], 64)
    student, stored = data[0], (kept.indices, kept.log_probs)
    ours = backward(kdloss.VanillaKD(1.0, 0.0), student, kept)
    gathered = backward(recipes.gathered, student, *stored)
    report(f"{what}, top 64: peak", peak(ours, student, kept) / peak(gathered, student, *stored), 0.4)
    report(f"{what}, top 64: time", time_ratio(ours, gathered), 0.9)


def bfloat16() -> None:
    """The gradient's error, relative to its norm, against float64 of the same rounded logits."""
    student, teacher, labels = logits(64, 128_256, torch.bfloat16)

    def gradient(loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        z = student.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(loss(z, teacher.to(dtype), labels), z)[0].double()

    exact = gradient(recipes.kl, torch.float64)
    for name, loss, most in (("", KL, 4e-3), (" (the plain recipe's)", recipes.kl, None)):
        error = (gradient(loss, torch.bfloat16) - exact).norm() / exact.norm()
        report(f"64 × 128 256 bf16 logits, KL: error of the gradient{name}", error.item(), most)


def lazy_logits() -> None:
    """Hidden states and heads, float32."""
    peaks, steps = {}, {}
    for tokens, most in ((512, 0.1), (1024, 0.05), (2048, None)):
        data = lazy(tokens, 128_256, 64, 64)
        steps[tokens] = backward(KL, *data)
        peaks[tokens] = peak(steps[tokens], *data)
        if most is not None:
            plain = peak(backward(dense(recipes.kl), *data), *data)
            report(f"{tokens} tokens, lazy, D = 64, V = 128 256, KL: peak", peaks[tokens] / plain, most)
    report("the same, 2048 tokens against 512 of ours: peak", peaks[2048] / peaks[512], 1.03)
    report("the same, 2048 tokens against 512 of ours: time", time_ratio(steps[2048], steps[512], 1), 5)
    data = lazy(512, 32_000, 512, 1024)
    hidden, weight, teacher_hidden, teacher_weight = (t.detach() for t in leaves(data[:2]))

    def products() -> None:
        z, _ = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        z @ weight, z.T @ hidden

    what = "512 tokens, lazy, D = 512 and 1024, V = 32 000"
    report(f"{what}, KL against the four products: time", time_ratio(backward(KL, *data), products, 5), 1.25)
    ratio = time_ratio(backward(BOTH, *data), backward(dense(recipes.kl_ce), *data))
    report(f"{what}, KL + CE: time", ratio, 1)
    second = 0.5 * kdloss.Logits(kdloss.divergences.reverse_kl, name="second")
    more = time_ratio(backward(BOTH + second, *data), backward(BOTH, *data), 5)
    another = time_ratio(lambda: teacher_hidden @ teacher_weight.T, backward(BOTH, *data), 5)
    report(f"{what}, KL + CE + reverse KL, against KL + CE of ours: time", more, 1 + another)
    half = data[2].clone()
    half[::2] = -100
    ratio = time_ratio(backward(BOTH, *data[:2], half), backward(BOTH, *data), 5)
    report(f"{what}, half of them ignored, against all of ours: time", ratio, 0.6)


def sizes() -> None:
    """KL + CE from 256 to 2048 tokens, two vocabularies, two dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, vocab in ((256, 32_000), (2048, 32_000), (256, 128_256)):
            data = logits(tokens, vocab, dtype)
            ours, plain = backward(BOTH, *data), backward(recipes.kl_ce, *data)
            what = f"{tokens} × {vocab} {str(dtype).removeprefix('torch.')} logits, KL + CE"
            report(f"{what}: time", time_ratio(ours, plain, 1))
            report(f"{what}: peak", peak(ours, *data) / peak(plain, *data))


def features() -> None:
    """A GPT-2-shaped pair: 12 blocks, widths 256 and 384, 8 x 128 tokens of 50 257."""
    shape = {"n_layer": 12, "n_positions": 128, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    student = GPT2LMHeadModel(GPT2Config(n_embd=256, n_head=4, **shape))
    teacher = GPT2LMHeadModel(GPT2Config(n_embd=384, n_head=6, **shape)).eval().requires_grad_(False)
    tokens = torch.randint(0, 50_257, (8, 128))
    batch = {"input_ids": tokens, "labels": tokens}
    wider = torch.nn.Linear(256, 384)

    def step(loss: Callable[[], Tensor], trained: torch.nn.Module) -> Step:
        def run() -> None:
            loss().backward()
            trained.zero_grad()

        return run

    def distilled(criterion: Any) -> Step:
        model = kdloss.Distillation(student, teacher, criterion)
        return step(lambda: model(**batch).loss, model)

    def old_way() -> Tensor:
        """The student once for its loss and once for its features, the teacher in full."""
        ce = student(**batch).loss
        with torch.no_grad():
            t = teacher(**batch, output_hidden_states=True).hidden_states
        s = student(**batch, output_hidden_states=True).hidden_states
        blocks = (0, 3, 6, 9)
        gaps = [torch.nn.functional.mse_loss(wider(s[i + 1]), t[i + 1]) for i in blocks]
        return 0.3 * ce + 0.7 * torch.stack(gaps).mean()

    vanilla, feature = distilled(kdloss.VanillaKD()), distilled(kdloss.FeatureKD())
    both = distilled(kdloss.FeatureKD(logit_weight=1.0))
    what = "GPT-2 shape, 12 blocks, D = 256 and 384, 8 × 128 tokens, FeatureKD"
    report(f"{what}, against VanillaKD: time", time_ratio(feature, vanilla, 5), 0.95)
    report(f"{what}, student twice and teacher in full: time", time_ratio(feature, step(old_way, student), 5), 0.65)
    report(f"{what} with the output term, against VanillaKD: time", time_ratio(both, vanilla, 5), 1.05)
    given = [*student.parameters(), *teacher.parameters()]
    base = peak(vanilla, *given)
    report(f"{what}, against VanillaKD: peak", peak(feature, *given) / base, 1.05)
    report(f"{what} with the output term, against VanillaKD: peak", peak(both, *given) / base, 1.05)


def main() -> None:
    """The table, row by row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| | ours / plain | at most |\n|---|---|---|")
    for part in (features, given_logits, bfloat16, lazy_logits, sizes):
        part()


if __name__ == "__main__":
    main()
