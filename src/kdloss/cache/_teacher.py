"""The teacher's pass over a shard's examples."""

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
    """A document: where it is, and what the teacher reads of it."""

    id: Id
    tokens: list[int]
    beside: dict[str, Any]


def top_k(teacher: nn.Module, examples: Examples, batch_size: int, k: int, temperature: float) -> Iterator[Kept]:
    """The k most probable classes at every position of every example (or of the example), a batch at a time."""
    for start in range(0, len(examples.ids), batch_size):
        rows = range(start, min(start + batch_size, len(examples.ids)))
        pieces = [pieces_of(examples, i) for i in rows]
        flat = [piece for row in pieces for piece in row]
        found: list[TopKLogits] = []
        for first in range(0, len(flat), batch_size):
            some = flat[first : first + batch_size]
            said = pass_of(teacher, some, examples)
            found += [TopKLogits.of(logits, k, temperature=temperature) for logits in apart(said, some)]
            if said.ndim == 2 and len(flat) > len(pieces):
                packed = next(row[0].id for row in pieces if len(row) > 1)
                raise ValueError(f"the teacher says one thing of an example, and {packed!r} holds several documents")
        documents = iter(found)
        lengths = [sum(next(documents).shape[0] for _ in row) for row in pieces]
        yield Kept.of(found, lengths, examples.ids[start : start + batch_size])


def pieces_of(examples: Examples, i: int) -> list[Piece]:
    """The documents of one row, each to be read by itself, so that none is another's context."""
    tokens, at, found = examples.tokens[i], 0, []
    for length in examples.documents[i]:
        span = slice(at, at + length)
        beside = {n: x[i][span] if n in examples.by_token else x[i] for n, x in examples.beside.items()}
        found.append(Piece(examples.ids[i], tokens[span], beside))
        at += length
    if len(found) > 1 and (whole := [n for n in examples.beside if n not in examples.by_token]):
        raise ValueError(
            f"example {examples.ids[i]!r} holds {len(found)} documents and one {whole[0]!r} for all of them"
        )
    return found


def pass_of(teacher: nn.Module, pieces: list[Piece], examples: Examples) -> Any:
    """What a teacher returns, in eval mode, of documents padded at the right."""
    inputs, device = _inputs(teacher, pieces, examples), device_of(teacher)
    with evaluating(teacher), torch.no_grad():
        out = teacher(**without_cache(teacher, {name: x.to(device) for name, x in inputs.items()}))
    resharded(teacher)
    return getattr(out, "logits", out)


def apart(logits: Any, pieces: list[Piece]) -> list[Tensor]:
    """The logits of each document, `[its length, classes]`, of a classifier `[1, classes]`."""
    longest = max(1, *(len(piece.tokens) for piece in pieces))
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != len(pieces):
        raise ValueError(
            "a cache keeps logits [batch, time, classes] or [batch, classes], and the teacher returned "
            f"{described(logits)} of {len(pieces)} examples; give a module of your own that returns such"
        )
    if logits.ndim == 2:
        return list(logits.unsqueeze(1))
    if logits.shape[1] != longest:
        raise ValueError(
            f"the teacher's logits stand at {logits.shape[1]} positions and the tokens at {longest}; a cache keeps "
            "what is said at each token, or one thing of each example"
        )
    return [row[: len(piece.tokens)] for row, piece in zip(logits, pieces, strict=True)]


def _inputs(teacher: nn.Module, pieces: list[Piece], examples: Examples) -> dict[str, Tensor]:
    longest = max(1, *(len(piece.tokens) for piece in pieces))  # one may be empty
    inputs: dict[str, Tensor] = {}
    if examples.of_tokens:
        padding = getattr(getattr(unwrap(teacher), "config", None), "pad_token_id", None)
        ids = _padded([piece.tokens for piece in pieces], longest)
        mask = _padded([[1] * len(piece.tokens) for piece in pieces], longest)
        if isinstance(padding, int) and padding >= 0:  # classifiers look for the last token before it
            ids = ids.where(mask > 0, padding)
        inputs |= {"input_ids": ids, "attention_mask": mask}
        names, anything = taken_by(teacher)
        if not anything and "attention_mask" not in names and not inputs.pop("attention_mask").all():
            raise ValueError(
                f"the teacher takes {names} and no attention_mask, and would read padding as if it were text; "
                "write batch_size=1"
            )
    for name in examples.beside:
        values = [piece.beside[name] for piece in pieces]
        inputs[name] = _padded(values, longest) if name in examples.by_token else _stacked(name, values)
    return inputs


def _padded(rows: list[list[Any]], longest: int) -> Tensor:
    """Rows of a number, or of several, for each token, with zeros behind them."""
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
            f"the column {name!r} has {tuple(tensors[0].shape)} in one example and others elsewhere, and a number for "
            "each token in none; make them of one size, or write batch_size=1"
        )
    return torch.stack(tensors)
