"""Run the teacher over a shard's examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture.take import described
from kdloss._inputs import taken_by
from kdloss.adapter import evaluating, resharded, without_cache
from kdloss.cache._dataset import Examples, Id
from kdloss.cache._shard import Kept
from kdloss.cache._weights import device_of
from kdloss.layers.names import unwrap
from kdloss.targets import TopKLogits


@dataclass(frozen=True)
class Piece:
    """A document: the id of its example, its tokens and the other columns that the teacher reads."""

    id: Id
    tokens: list[int]
    extra: dict[str, Any]


def top_k(teacher: nn.Module, examples: Examples, batch_size: int, k: int, temperature: float) -> Iterator[Kept]:
    """Yield the k most probable classes at every position, or of every example, one batch at a time."""
    for start in range(0, len(examples.ids), batch_size):
        rows = range(start, min(start + batch_size, len(examples.ids)))
        pieces = [pieces_of(examples, i) for i in rows]
        flat = [piece for row in pieces for piece in row]
        found: list[TopKLogits] = []
        for first in range(0, len(flat), batch_size):
            some = flat[first : first + batch_size]
            batch = pass_of(teacher, some, examples)
            found += [TopKLogits.of(x, k, temperature=temperature) for x in split_logits(batch, some)]
            if batch.ndim == 2 and len(flat) > len(pieces):
                packed = next(row[0].id for row in pieces if len(row) > 1)
                raise ValueError(
                    f"the teacher returns one row of logits for each example, and {packed!r} holds several documents; "
                    "give each document as an example of its own"
                )
        documents = iter(found)
        lengths = [sum(next(documents).shape[0] for _ in row) for row in pieces]
        yield Kept.of(found, lengths, examples.ids[start : start + batch_size])


def pieces_of(examples: Examples, i: int) -> list[Piece]:
    """The documents of one row. The teacher reads each one by itself, so that none is the context of another."""
    tokens, at, found = examples.tokens[i], 0, []
    for length in examples.documents[i]:
        span = slice(at, at + length)
        extra = {n: x[i][span] if n in examples.by_token else x[i] for n, x in examples.extra.items()}
        found.append(Piece(examples.ids[i], tokens[span], extra))
        at += length
    if len(found) > 1 and (shared := [n for n in examples.extra if n not in examples.by_token]):
        raise ValueError(
            f"example {examples.ids[i]!r} holds {len(found)} documents and only one {shared[0]!r} for all of them; "
            "give each document as an example of its own"
        )
    return found


def pass_of(teacher: nn.Module, pieces: list[Piece], examples: Examples) -> Any:
    """The teacher's logits for some documents, padded at the right, in eval mode."""
    inputs, device = _inputs(teacher, pieces, examples), device_of(teacher)
    with evaluating(teacher), torch.no_grad():
        out = teacher(**without_cache(teacher, {name: x.to(device) for name, x in inputs.items()}))
    resharded(teacher)
    return getattr(out, "logits", out)


def split_logits(logits: Any, pieces: list[Piece]) -> list[Tensor]:
    """Split logits by document: `[its length, classes]` each, or `[1, classes]` for a classifier."""
    longest = max(1, *(len(piece.tokens) for piece in pieces))
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != len(pieces):
        raise ValueError(
            "a cache keeps logits [batch, time, classes] or [batch, classes], and the teacher returned "
            f"{described(logits)} for {len(pieces)} examples; wrap the teacher in a module that returns such logits"
        )
    if logits.ndim == 2:
        return list(logits.unsqueeze(1))
    if logits.shape[1] != longest:
        raise ValueError(
            f"the teacher's logits have {logits.shape[1]} positions and its tokens {longest}; a cache keeps one row of "
            "logits for each token, [batch, time, classes], or for each example, [batch, classes]"
        )
    return [row[: len(piece.tokens)] for row, piece in zip(logits, pieces, strict=True)]


def _inputs(teacher: nn.Module, pieces: list[Piece], examples: Examples) -> dict[str, Tensor]:
    longest = max(1, *(len(piece.tokens) for piece in pieces))  # an example may be empty
    inputs: dict[str, Tensor] = {}
    if examples.of_tokens:
        padding = getattr(getattr(unwrap(teacher), "config", None), "pad_token_id", None)
        ids = _padded([piece.tokens for piece in pieces], longest)
        mask = _padded([[1] * len(piece.tokens) for piece in pieces], longest)
        if isinstance(padding, int) and padding >= 0:  # classifiers read the last token before the padding
            ids = ids.where(mask > 0, padding)
        inputs |= {"input_ids": ids, "attention_mask": mask}
        names, anything = taken_by(teacher)
        if not anything and "attention_mask" not in names and not inputs.pop("attention_mask").all():
            raise ValueError(
                f"the teacher takes {names} and no attention_mask, and would read padding as if it were text; "
                "write batch_size=1"
            )
    for name in examples.extra:
        values = [piece.extra[name] for piece in pieces]
        inputs[name] = _padded(values, longest) if name in examples.by_token else _stacked(name, values)
    return inputs


def _padded(rows: list[list[Any]], longest: int) -> Tensor:
    """Stack rows with one or several numbers for each token, padded with zeros at the right."""
    each = next((torch.tensor(row).shape[1:] for row in rows if row), ())
    padded = torch.zeros(len(rows), longest, *each, dtype=torch.int64)
    for i, row in enumerate(rows):
        if row:
            padded[i, : len(row)] = torch.tensor(row)
    return padded


def _stacked(name: str, values: list[Any]) -> Tensor:
    tensors = [torch.as_tensor(x) for x in values]
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(
            f"the column {name!r} has shape {tuple(tensors[0].shape)} in one example and another elsewhere, and not "
            "one number for each token; give all examples one shape, or write batch_size=1"
        )
    return torch.stack(tensors)
