"""Time and peak memory on a GPU: kdloss beside plain and compiled PyTorch recipes and Liger. Run `make gpu`.

8192 tokens, 128 256 classes, D = 2048 and 4096. Times come from CUDA events, with all ways in turn, as medians. Peaks
come from CUDA's allocator, without the inputs. A way that needs too much memory has the row "out of memory". Without a
GPU the script prints one sentence and ends.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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
DTYPES = {short(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
PAGE = Path(__file__).parent.parent / "docs" / "results" / "gpu.md"
SIZES = {"tokens": 8192, "vocab": 128_256, "width": 2048, "teacher_width": 4096, "k": 64}
HEADER = "| | way | ms | peak, MiB |\n|---|---|---|---|"
LOSSES = {  # ours, the recipe, Liger's (beta, alpha, T, factor of its value); None if Liger has no kernel
    "KL + CE": (VanillaKD(T, 0.5), recipes.kl_ce, (0.0, 0.5, T, T**2)),
    "JSD": (VanillaKD(T, 0.0, divergence=divergences.jsd), recipes.jsd, (0.5, 0.0, T, 1.0)),
    "reverse KL": (VanillaKD(T, 0.0, divergence=divergences.reverse_kl), recipes.reverse_kl, (1.0, 0.0, T, T**2)),
    "TVD": (VanillaKD(T, 0.0, divergence=divergences.total_variation), recipes.total_variation, None),
}
Ways = dict[str, Step]


def ways(ours: Callable[..., Any], recipe: Callable[..., Any], peer: Callable[..., Any] | None, *given: Any) -> Ways:
    """All ways to compute one loss of the same inputs."""
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
    """Each loss with all its ways. The inputs of a loss are made when its turn comes."""
    tokens, vocab, width, k = (size[name] for name in ("tokens", "vocab", "width", "k"))
    wide = f"{shape(tokens, vocab)} logits"
    for name, (ours, recipe, options) in LOSSES.items():
        given = on(device, logits, tokens, vocab, dtype)
        peer = None if options is None else liger.kernel(*options, device)
        yield f"{name}, {wide}", ways(ours, recipe, peer, *given)
        del given
    given = on(device, top_k, tokens, vocab, dtype, k)
    yield f"KL of the top {k}, {wide}", ways(VanillaKD(1.0, 0.0), gathered, None, *given)
    del given
    for name in ("KL + CE", "JSD"):
        ours, recipe, options = LOSSES[name]
        given = on(device, lazy, tokens, vocab, width, size["teacher_width"], dtype)
        peer = liger.fused_linear(*options, chunk=min(tokens, 1024))
        what = f"{name}, {tokens} hidden states, D = {width} and {size['teacher_width']}, V = {shape(vocab)}"
        yield what, ways(ours, dense(recipe), peer, *given)
        del given
    given = on(device, logits, tokens, width, dtype)[:2]
    yield f"feature MSE, {shape(tokens, width)}", ways(mse, F.mse_loss, None, *given)


def on(device: str, make: Callable[..., Any], *args: Any) -> Any:
    """Make tensors on a device."""
    with torch.device(device):
        return make(*args)


def top_k(tokens: int, vocab: int, dtype: torch.dtype, k: int) -> tuple[torch.Tensor, TopKLogits]:
    """A student's logits, and the teacher's k most probable classes."""
    student, teacher, _ = logits(tokens, vocab, dtype)
    return student, TopKLogits.of(teacher, k)


def gathered(student: torch.Tensor, kept: TopKLogits) -> torch.Tensor:
    """The plain recipe for top-k logits."""
    return recipes.gathered(student, kept.indices, kept.log_probs)


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of `distances.mse` over a batch."""
    return distances.mse(student, teacher).mean()


def times(found: Ways, device: str, rounds: int) -> dict[str, float]:
    """The median time of each way in ms; ways run in turn."""
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
    """The peak memory of a step in bytes, above what was allocated before."""
    if device == "cpu":
        return peak(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(device: str, dtype: torch.dtype, size: dict[str, int], rounds: int = 10) -> Iterator[str]:
    """Yield the rows of the table as they are measured."""
    for what, found in cases(device, dtype, size):
        peaks = {name: tried(step, device) for name, step in found.items()}
        able = {name: step for name, step in found.items() if peaks[name] is not None}
        taken = times(able, device, rounds)
        for name, size_of in peaks.items():
            measured = "out of memory | |" if size_of is None else f"{taken[name]:.3g} | {size_of / 2**20:.4g} |"
            yield f"| {what}, {short(dtype)} | {name} | {measured}"
        found.clear(), able.clear()


def tried(step: Step, device: str) -> int | None:
    """The peak of a step after compilation and autotuning; None if the memory is too small."""
    try:
        for _ in range(3):
            step()
        return most(step, device)
    except torch.OutOfMemoryError:
        pass  # leaving the handler frees the traceback, which holds the step's tensors
    gc.collect()
    torch.cuda.empty_cache()
    return None


def main(*names: str) -> None:
    """Write the tables of this GPU for these dtypes."""
    if not torch.cuda.is_available():
        print("torch.cuda finds no GPU here, so nothing was measured")
        return
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    lines = [f"{properties.name}, {memory:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}.", "", HEADER]
    print("\n".join(lines), flush=True)
    for name in names or DTYPES:
        for row in table("cuda", DTYPES[name], SIZES):
            print(row, flush=True)
            lines.append(row)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
