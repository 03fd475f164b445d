"""How much memory a step takes for logits: formulas, the tables of docs/memory.md, and what was measured beside them.

`python benchmarks/memory.py` prints the tables, `python benchmarks/memory.py measure` what a step takes here.
"""

import sys
from collections.abc import Iterator

import recipes
import torch
from measure import backward, peak
from sections.given import lazy, logits, short

import kdloss
from kdloss.engine.block_sizes import block_rows

GPU, CPU = torch.device("cuda"), torch.device("cpu")
VOCABULARIES = (32_000, 50_257, 128_256, 151_936)
TOKENS = (1024, 4096, 8192, 32_768)
HEADER = "| vocabulary | tokens | plain | by blocks | on logits |\n|---|---|---|---|---|"


def one(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of one tensor of logits."""
    return tokens * vocabulary * dtype.itemsize


def plain(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """KL and cross-entropy in plain PyTorch: both models' logits, and six tensors as large, gradients included."""
    return 8 * one(tokens, vocabulary, dtype)


def given(tokens: int, vocabulary: int, dtype: torch.dtype, *, teachers: int = 1, overwrite: bool = False) -> int:
    """A criterion on logits: those of the student and of each teacher, and the gradient, unless it overwrites some."""
    return (1 + teachers + (not overwrite)) * one(tokens, vocabulary, dtype)


def top_k(tokens: int, vocabulary: int, dtype: torch.dtype, k: int) -> int:
    """A criterion on the student's logits and a stored teacher's top k: int64 indices and float32 values."""
    return 2 * one(tokens, vocabulary, dtype) + tokens * k * (8 + 4)


def blocks(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device = GPU) -> int:
    """Hidden states and heads: one block of rows of the student's logits, and one of a teacher's."""
    rows = min(tokens, block_rows(device, 2 * vocabulary * dtype.itemsize))
    return 2 * one(rows, vocabulary, dtype)


def head_gradient(vocabulary: int, width: int) -> int:
    """The gradient of the student's head, summed over blocks in float32."""
    return 4 * vocabulary * width


def gib(size: float) -> str:
    """Bytes in GiB, to two digits."""
    number = size / 2**30
    return f"{number:.2f}" if number < 1 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def table(dtype: torch.dtype) -> Iterator[str]:
    """The rows of one of the page's tables, in GiB."""
    for vocabulary in VOCABULARIES:
        for tokens in TOKENS:
            sizes = [f(tokens, vocabulary, dtype) for f in (plain, blocks, given)]
            yield f"| {vocabulary:,} | {tokens:,} | {' | '.join(map(gib, sizes))} |".replace(",", " ")


def measured(tokens: int, vocabulary: int, widths: tuple[int, int], dtype: torch.dtype, way: str) -> tuple[int, int]:
    """The peak of a step beyond what it is given, on the CPU, and what the formula says of it."""
    if way == "blocks":
        step = backward(kdloss.VanillaKD(2.0, 0.5), *lazy(tokens, vocabulary, *widths, dtype))
        return peak(step), blocks(tokens, vocabulary, dtype, CPU) + head_gradient(vocabulary, widths[0])
    loss = recipes.kl_ce if way == "plain" else kdloss.VanillaKD(2.0, 0.5)
    both = 2 * one(tokens, vocabulary, dtype)  # the step is given both models' logits
    expected = plain(tokens, vocabulary, dtype) if way == "plain" else given(tokens, vocabulary, dtype)
    return peak(backward(loss, *logits(tokens, vocabulary, dtype))) + both, expected


def main(what: str = "tables") -> None:
    """Print the tables, or measure."""
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        if what == "tables":
            print("\n".join([short(dtype), "", HEADER, *table(dtype), ""]))
            continue
        for way, tokens in (("plain", 256), ("given", 256), ("blocks", 256), ("blocks", 4096)):
            seen, expected = measured(tokens, 151_936, (64, 128), dtype, way)
            print(f"{short(dtype)} {way}, {tokens} tokens: {gib(seen)} GiB, by the formula {gib(expected)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
