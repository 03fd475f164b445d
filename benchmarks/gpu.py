"""Time and peak memory on a card, of ours beside plain and compiled recipes and Liger: `make gpu`.

8192 tokens, 128 256 classes, D = 2048 and 4096. Times by the card's own events, all ways in turn, medians; peaks as
the card's allocator saw them, beyond what was given. A way that needs more memory than there is says so. Without a card
it ends with one sentence.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import liger
import recipes
import torch
import torch.nn.functional as F
from measure import Step, backward, engine, peak
from sections.given import lazy, logits, shape, short
from sections.heads import dense

from kdloss import TopKLogits, VanillaKD, distances, divergences

T = recipes.T
PAGE = Path(__file__).parent.parent / "docs" / "results" / "gpu.md"
SIZES = {"tokens": 8192, "vocab": 128_256, "width": 2048, "teacher_width": 4096, "k": 64}
HEADER = "| | way | ms | peak, MiB |\n|---|---|---|---|"
LOSSES = {  # ours, the recipe, Liger's beta, alpha and the factor of its value
    "KL + CE": (VanillaKD(T, 0.5), recipes.kl_ce, (0.0, 0.5, T, T**2)),
    "JSD": (VanillaKD(T, 0.0, divergence=divergences.jsd), recipes.jsd, (0.5, 0.0, T, 1.0)),
    "reverse KL": (VanillaKD(T, 0.0, divergence=divergences.reverse_kl), recipes.reverse_kl, (1.0, 0.0, T, T**2)),
}
Ways = dict[str, Step]


def ways(ours: Callable[..., Any], recipe: Callable[..., Any], peer: Callable[..., Any] | None, *given: Any) -> Ways:
    """All ways to compute one loss of what is given."""
    torch._dynamo.reset()

    def switched(compiled: bool) -> Step:
        step = backward(ours, *given)

        def run() -> None:
            engine(compiled)
            step()

        return run

    found = {"ours, compiled": switched(True), "ours": switched(False), "plain": backward(recipe, *given)}
    found["plain, compiled"] = backward(torch.compile(recipe), *given)
    return found | ({"Liger": backward(peer, *given)} if peer is not None else {})


def cases(device: str, dtype: torch.dtype, size: dict[str, int]) -> Iterator[tuple[str, Ways]]:
    """Each loss with its ways; what it is given is made when it is its turn."""
    tokens, vocab, k = size["tokens"], size["vocab"], size["k"]
    wide = f"{shape(tokens, vocab)} logits"
    with torch.device(device):
        for name, (ours, recipe, options) in LOSSES.items():
            yield f"{name}, {wide}", ways(ours, recipe, liger.kernel(*options, device), *logits(tokens, vocab, dtype))
        student, teacher, _ = logits(tokens, vocab, dtype)
        kept = TopKLogits.of(teacher, k)
        stored = kept.indices, kept.log_probs
        del teacher
        yield f"KL of the top {k}, {wide}", ways(VanillaKD(1.0, 0.0), partial(_gathered, stored), None, student, kept)
        del student, kept, stored
        for name in ("KL + CE", "JSD"):
            ours, recipe, options = LOSSES[name]
            given = lazy(tokens, vocab, size["width"], size["teacher_width"], dtype)
            what = (
                f"{name}, {tokens} hidden states, D = {size['width']} and {size['teacher_width']}, V = {shape(vocab)}"
            )
            yield what, ways(ours, dense(recipe), liger.fused_linear(*options, chunk=min(tokens, 1024)), *given)
            del given
        student, teacher = torch.randn(2, tokens, size["width"]).to(dtype)
        given = student.clone().requires_grad_(), teacher
        yield f"feature MSE, {shape(tokens, size['width'])}", ways(_mse, F.mse_loss, None, *given)


def _mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return distances.mse(student, teacher).mean()


def _gathered(stored: tuple[torch.Tensor, torch.Tensor], student: torch.Tensor, kept: Any) -> torch.Tensor:
    return recipes.gathered(student, *stored)


def times(found: Ways, device: str, rounds: int) -> dict[str, float]:
    """The median time of each way in ms, all in turn."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, step in found.items():
            if device == "cpu":
                start = time.process_time()
                step()
                taken[name].append(1e3 * (time.process_time() - start))
                continue
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            step()
            last.record()
            torch.cuda.synchronize()
            taken[name].append(first.elapsed_time(last))
    return {name: statistics.median(each) for name, each in taken.items()}


def most(step: Step, device: str) -> int:
    """The peak of a step in bytes, beyond what was there before."""
    if device == "cpu":
        return peak(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(device: str, dtype: torch.dtype, size: dict[str, int], rounds: int = 10) -> Iterator[str]:
    """The rows, as they are measured."""
    for what, found in cases(device, dtype, size):
        peaks = {}
        for name in list(found):
            try:
                found[name](), found[name]()  # it is compiled, and chooses its kernels
                peaks[name] = most(found[name], device)
            except torch.OutOfMemoryError:
                del found[name]
                yield f"| {what}, {short(dtype)} | {name} | out of memory | |"
            gc.collect()
        for name, ms in times(found, device, rounds).items():
            yield f"| {what}, {short(dtype)} | {name} | {ms:.3g} | {peaks[name] / 2**20:.4g} |"
        found.clear()
        gc.collect()


def main() -> None:
    """All tables of this card."""
    if not torch.cuda.is_available():
        print("there is no card here that torch.cuda can use, so nothing was measured")
        return
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    lines = [f"{properties.name}, {memory:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}.", "", HEADER]
    print("\n".join(lines), flush=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for row in table("cuda", dtype, SIZES):
            print(row, flush=True)
            lines.append(row)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
