"""Read the log-probabilities that vLLM and SGLang return."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def from_rows(rows: Sequence[Any], of_tokens: bool) -> tuple[Tensor, Tensor]:
    """Indices and log-probabilities of a text or a batch of texts, from a server's rows."""
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence) or not len(rows):
        raise TypeError(f"rows are a list with one row for each token, or a list of such lists, got {rows!r:.80}")
    batch = not any(_is_row(row) for row in rows)
    texts = [[_pairs(row) for row in text] for text in (rows if batch else [rows])]
    if of_tokens:
        if any(text and text[0] for text in texts):
            raise ValueError(
                "rows of tokens begin with None, since the first token has no prediction; write [None, *rows], or "
                "of='logits' where row t belongs to the logits of position t already"
            )
        texts = [[*text[1:], []] if text else [] for text in texts]
    length, k = max(map(len, texts)), max((len(row) for text in texts for row in text), default=0)
    indices = torch.full((len(texts), length, max(k, 1)), -1)
    log_probs = torch.full(indices.shape, -torch.inf)
    for b, text in enumerate(texts):
        for t, row in enumerate(text):
            if row:
                indices[b, t, : len(row)] = torch.tensor([token for token, _ in row])
                log_probs[b, t, : len(row)] = torch.tensor([value for _, value in row])
    return (indices, log_probs) if batch else (indices[0], log_probs[0])


def _is_row(row: Any) -> bool:
    """Whether this is one token's row, or the None of a text's first token."""
    if row is None or isinstance(row, Mapping):
        return True
    return isinstance(row, Sequence) and any(
        isinstance(x, Sequence) and not isinstance(x, str) and len(x) > 1 and isinstance(x[0], Real) for x in row
    )


def _pairs(row: Any) -> list[tuple[int, float]]:
    """Pairs of id and log-probability, each id once, the most probable first."""
    if row is None:
        return []
    try:
        found = row.items() if isinstance(row, Mapping) else [(x[1], x[0]) for x in row]
        once = {int(token): _number(value) for token, value in found}
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise TypeError(
            "a row is None, a mapping from token ids to log-probabilities (numbers, or objects with a logprob), or a "
            f"list of tuples (log-probability, id, ...), got {row!r:.80}"
        ) from error
    return sorted(once.items(), key=lambda pair: -pair[1])


def _number(value: Any) -> float:
    if isinstance(value, Mapping):
        value = value["logprob"]
    return float(getattr(value, "logprob", value))
