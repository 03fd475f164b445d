"""Examples as they come from a dataset: ids, and tokens without padding."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

Id = str | int


@dataclass(frozen=True)
class Examples:
    """Examples as they are given to the teacher: without padding."""

    ids: list[Id]
    tokens: list[list[int]]

    def digest(self) -> str:
        """What tells these examples from others."""
        return hashlib.sha256(json.dumps([self.ids, self.tokens]).encode()).hexdigest()


def checked_ids(dataset: Any, id_column: str) -> list[Id]:
    """All ids, none twice."""
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be a datasets.Dataset, which has a length, got {type(dataset).__name__}")
    if absent := {id_column, "input_ids"} - set(columns or ()):
        raise ValueError(
            f"the dataset has the columns {columns}, not {sorted(absent)}; it needs input_ids, and ids in "
            'id_column="..."; without ids write '
            'dataset.map(lambda _, i: {"id": i}, with_indices=True)'
        )
    ids = list(dataset.with_format(None)[id_column])
    if not ids:
        raise ValueError("the dataset is empty; there is nothing to write")
    if wrong := [x for x in ids if isinstance(x, bool) or type(x) is not type(ids[0])]:
        raise TypeError(f"ids must be all strings or all integers, got {ids[0]!r} and {wrong[0]!r}")
    if not isinstance(ids[0], (str, int)):
        raise TypeError(f"ids must be strings or integers, got {ids[0]!r}")
    (most, times), *_ = Counter(ids).most_common(1)
    if times > 1:
        raise ValueError(f"id {most!r} stands for {times} examples; ids must be unique")
    return ids


def read(dataset: Any, rows: slice, id_column: str) -> Examples:
    """Some examples without their padding."""
    found = dataset.with_format(None)[rows]
    ids, tokens = list(found[id_column]), found["input_ids"]
    masks = found.get("attention_mask") or [[1] * len(row) for row in tokens]
    return Examples(ids, [real(*row) for row in zip(ids, tokens, masks, strict=True)])


def real(id: Id, tokens: list[int], mask: list[int]) -> list[int]:
    """The tokens that a mask, with zeros at the beginning or the end only, leaves."""
    if len(tokens) != len(mask):
        raise ValueError(f"example {id!r} has {len(tokens)} input_ids and an attention_mask of {len(mask)}")
    kept = [token for token, there in zip(tokens, mask, strict=True) if there]
    start = mask.index(1) if 1 in mask else 0
    if kept != tokens[start : start + len(kept)] or not all(mask[start : start + len(kept)]):
        raise ValueError(f"the attention_mask of example {id!r} has zeros between ones; padding is outside")
    return kept
