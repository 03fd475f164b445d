"""Read examples from a dataset: ids, tokens without padding, and other columns that the teacher reads."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kdloss.cache import _documents

Id = str | int
_log = logging.getLogger("kdloss")
_OF_THE_TOKENS = {"input_ids", "attention_mask", *_documents.COLUMNS}


@dataclass(frozen=True)
class Examples:
    """Examples as the teacher reads them: without padding, and packed rows split into documents.

    `documents` are the lengths of each row's documents. `extra` holds the other columns that the teacher reads, by
    name; `by_token` names those with one entry for each token. `of_tokens` is False for a teacher without `input_ids`.
    """

    ids: list[Id]
    tokens: list[list[int]]
    documents: list[list[int]]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    by_token: frozenset[str] = frozenset()
    of_tokens: bool = True

    def digest(self) -> str:
        """A checksum of these examples."""
        packed = [self.documents] if any(len(lengths) > 1 for lengths in self.documents) else []
        content = [self.ids, self.tokens, *packed, *([self.extra] if self.extra else [])]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def checked_ids(dataset: Any, id_column: str, of_tokens: bool = True) -> list[Id]:
    """All ids, checked to be unique strings or integers."""
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be a datasets.Dataset, which has a length, got {type(dataset).__name__}")
    if absent := {id_column, *(["input_ids"] if of_tokens else [])} - set(columns or ()):
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


def extra_columns(dataset: Any, id_column: str, names: Collection[str], of_tokens: bool) -> list[str]:
    """The columns that the teacher's forward names, except ids, tokens and labels."""
    left_out = {id_column, "labels", *_OF_THE_TOKENS}
    found = [column for column in dataset.column_names if column in names and column not in left_out]
    if not of_tokens and not found:
        raise ValueError(f"the teacher takes {sorted(names)}, and the dataset has the columns {dataset.column_names}")
    _log.info("of the dataset's columns the teacher reads %s", [*(["input_ids"] if of_tokens else []), *found])
    return found


def read(dataset: Any, rows: slice, id_column: str, columns: Collection[str] = (), of_tokens: bool = True) -> Examples:
    """Read some examples and remove their padding."""
    found = dataset.with_format(None)[rows]
    ids = list(found[id_column])
    if not of_tokens:
        return Examples(
            ids, [[] for _ in ids], [[0] for _ in ids], {name: found[name] for name in columns}, of_tokens=False
        )
    tokens = found["input_ids"]
    masks = found.get("attention_mask") or [[1] * len(row) for row in tokens]
    spans = [unpadded(*row) for row in zip(ids, tokens, masks, strict=True)]
    cut = {name: found[name] for name in columns}
    by_token = frozenset(name for name, x in cut.items() if _by_token(x, tokens))
    for name in by_token:
        cut[name] = [row[span] for row, span in zip(cut[name], spans, strict=True)]
    documents = [
        _documents.lengths(id, {name: found[name][i] for name in _documents.COLUMNS if name in found}, masks[i], span)
        for i, (id, span) in enumerate(zip(ids, spans, strict=True))
    ]
    kept = [row[span] for row, span in zip(tokens, spans, strict=True)]
    return Examples(ids, kept, documents, cut, by_token)


def unpadded(id: Id, tokens: list[int], mask: list[int]) -> slice:
    """The span of tokens that the mask keeps. It may have zeros only at the beginning and the end."""
    if len(tokens) != len(mask):
        raise ValueError(f"example {id!r} has {len(tokens)} input_ids and an attention_mask of {len(mask)}")
    start = next((i for i, there in enumerate(mask) if there), 0)
    span = slice(start, start + sum(map(bool, mask)))
    if not all(mask[span]):
        raise ValueError(f"the attention_mask of example {id!r} has zeros between ones; padding is outside")
    return span


def _by_token(rows: list[Any], tokens: list[list[int]]) -> bool:
    """Whether a column has an integer, or a list of integers, for each token."""
    if any(not isinstance(x, list) or len(x) != len(row) for x, row in zip(rows, tokens, strict=True)):
        return False
    first: Any = next((x[0] for x in rows if x), 0)
    while isinstance(first, list):
        first = first[0] if first else 0
    return isinstance(first, int)
