"""How many rows the engine computes at a time."""

from collections.abc import Iterator, Sequence

import torch


def equal_blocks(rows: int, most: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Split rows into blocks of at most `most` rows; sizes differ by one row at most, the larger ones first."""
    blocks = -(-rows // most) if rows else 0
    for k in range(blocks):
        yield first - (-rows * k // blocks), first - (-rows * (k + 1) // blocks)


def scratch_rows(device: torch.device, classes: int, coarseness: int = 1) -> int:
    """How many rows to compute at a time: few enough for a CPU's cache, or enough to fill an accelerator."""
    entries = 2**19 * coarseness * torch.get_num_threads() if device.type == "cpu" else 2**25 * min(coarseness, 2)
    return max(1, entries // max(classes, 1))


def compiled_rows(
    device: torch.device, classes: int, rows: int, top_k: Sequence[int] = (), scratch: bool = True
) -> int:
    """The same for compiled work, where every block costs Python time.

    On a CPU all rows at once, or an eighth of them, within bounds, where the work needs `scratch` memory as large as
    the logits. On an accelerator as many rows as 32-bit indices allow, or half of that for top-k teachers, whose
    other classes are written to memory on the way.
    """
    if device.type == "cpu":
        most = (2**20 if scratch else 2**24) * torch.get_num_threads()
        few = max(most // 4, classes * rows // 8) if scratch else most
    else:
        most = few = 2**28 if top_k else 2**29
    return max(2, min(most, few) // max(classes, 1))


def made_rows(device: torch.device, rows: int, mine: int, largest: int, kept: int) -> tuple[int, int]:
    """How many rows of the student's and of the teachers' lazy logits to compute at a time.

    Where several teachers' rows are kept, there are fewer of them, so that together they take the memory of one.
    Sizes of a row in bytes: the student's is `mine`, the `largest` teacher's, and all that is `kept` together.
    """
    if mine + kept == 0:
        return max(rows, 1), max(rows, 1)
    most = min(block_rows(device, 2 * max(mine, largest)), max(rows, 1))
    return most, most if kept == largest else max(most * largest // kept, min(most, 64))


def block_rows(device: torch.device, row_bytes: int) -> int:
    """How many rows of student and one teacher to compute at a time: what fits in 2^27 bytes.

    On an accelerator at least as many rows as make the product with the head limited by arithmetic, and not by reading
    the head.
    """
    rows = 2**27 // max(row_bytes, 1) // 128 * 128
    return min(max(rows, 128), 1024) if device.type == "cpu" else max(rows, 1024)
