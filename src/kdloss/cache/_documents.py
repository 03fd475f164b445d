"""Find the documents packed into one row, from position ids, sequence numbers or lengths."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

COLUMNS = ("position_ids", "seq_idx", "seq_lengths")


def lengths(id: Any, columns: Mapping[str, Any], mask: Sequence[int], span: slice) -> list[int]:
    """The lengths of a row's documents, without its padding.

    A document begins where `position_ids` are 0 again, where the number in `seq_idx` or in the `attention_mask`
    changes, or as `seq_lengths` states.

    Raises: ValueError if positions are not 0, 1, 2, ... in each document, or if lengths don't add up.

    >>> lengths("a", {"position_ids": [0, 1, 2, 0, 1]}, [1, 1, 1, 1, 0], slice(0, 4))
    [3, 1]
    """
    numbers = list(mask[span])
    size, starts = len(numbers), {0}
    for row in (numbers, *([columns["seq_idx"][span]] if "seq_idx" in columns else [])):
        starts |= {i + 1 for i, (one, next_one) in enumerate(pairwise(row)) if one != next_one}
    if "seq_lengths" in columns:
        *inner, total = accumulate(columns["seq_lengths"])
        if total != size:
            raise ValueError(f"example {id!r} has {size} tokens, and seq_lengths {columns['seq_lengths']}")
        starts |= set(inner)
    positions = columns["position_ids"][span] if "position_ids" in columns else None
    if positions is not None:
        starts |= {i for i, position in enumerate(positions) if position == 0}
    ends = [*sorted(starts - {0, size}), size]
    found = [end - start for start, end in pairwise([0, *ends])] if size else [0]
    if positions is not None and [*positions] != [i for length in found for i in range(length)]:
        raise ValueError(
            f"the position_ids of example {id!r} don't count 0, 1, 2, ... anew in each document; leave the column out "
            "where rows are no packed documents"
        )
    return found
