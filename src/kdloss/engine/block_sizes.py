"""How many rows are worked on at a time."""

from collections.abc import Iterator, Sequence

import torch


def equal_blocks(rows: int, most: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Blocks of at most so many rows, of equal size but for one row, the largest in front."""
    blocks = -(-rows // most) if rows else 0
    for k in range(blocks):
        yield first - (-rows * k // blocks), first - (-rows * (k + 1) // blocks)


def scratch_rows(device: torch.device, classes: int, coarseness: int = 1) -> int:
    """How many rows are worked on at a time: what stays in a CPU's cache, or fills an accelerator."""
    entries = 2**19 * coarseness * torch.get_num_threads() if device.type == "cpu" else 2**25 * min(coarseness, 2)
    return max(1, entries // max(classes, 1))


def compiled_rows(
    device: torch.device, classes: int, rows: int, top_k: Sequence[int] = (), scratch: bool = True
) -> int:
    """The same for compiled work, where every block costs some Python: all rows, where that takes no `scratch` as
    large as they are, and else an eighth of them, within bounds; on an accelerator what leaves indices small, and a
    quarter of it where the classes that were not kept are written on the way.
    """
    if device.type == "cpu":
        most = (2**20 if scratch else 2**24) * torch.get_num_threads()
        few = max(most // 4, classes * rows // 8) if scratch else most
    else:
        most = few = 2**27 if top_k else 2**29
    return max(2, min(most, few) // max(classes, 1))


def made_rows(device: torch.device, rows: int, mine: int, largest: int, kept: int) -> tuple[int, int]:
    """How many rows of the student's logits are made at a time, and of the teachers': fewer, where several are kept,
    so that all of them take the memory of one. In bytes, a row of the student's is `mine`, and of the teachers' the
    `largest`, and what is `kept` of all.
    """
    if mine + kept == 0:
        return max(rows, 1), max(rows, 1)
    most = min(block_rows(device, 2 * max(mine, largest)), max(rows, 1))
    return most, most if kept == largest else max(most * largest // kept, min(most, 64))


def block_rows(device: torch.device, row_bytes: int) -> int:
    """How many rows of student and one teacher are made at a time: those of 2^27 bytes, on an accelerator at least as
    many as it takes to be bound by arithmetic, not by reading heads.
    """
    rows = 2**27 // max(row_bytes, 1) // 128 * 128
    return min(max(rows, 128), 1024) if device.type == "cpu" else max(rows, 1024)
