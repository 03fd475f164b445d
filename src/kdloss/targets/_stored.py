"""What stands in a stored teacher's rows: whether it can be, and how servers write it."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Log-probabilities of bfloat16 are off by up to this share of themselves.
_ROUNDED = 2.0**-8


def free_to_look(*tensors: Tensor | None) -> bool:
    """Whether numbers can be looked at without waiting for a device, or for those of a traced graph."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    there = [t for t in tensors if t is not None]
    return all(isinstance(t, Tensor) and type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in there)


def padding(ids: Tensor, log_probs: Tensor) -> Tensor:
    """Rows `[...]` that nobody can mean: one class and one number in all slots, or no number."""
    there = (ids[..., 0] == ids[..., -1]) & (ids[..., 0] >= 0) & (ids.shape[-1] > 1)
    if there.any():
        there &= (ids == ids[..., :1]).all(-1) & (log_probs == log_probs[..., :1]).all(-1)
    nothing = log_probs.sum(-1).isnan()  # of infinities, too
    return there | (nothing & log_probs.isnan().any(-1) if nothing.any() else nothing)


def look(ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, classes: int | None, keep: Tensor) -> None:
    """Raise for a class that is twice in a row that counts or out of range, and for what are no log-probabilities."""
    look_at_range(ids, classes, keep)
    in_order = ids.sort(-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0) & keep.unsqueeze(-1)
    if twice.any():
        *row, slot = twice.nonzero()[0].tolist()
        raise ValueError(
            f"indices{row} has the class {int(in_order[tuple(row)][slot])} twice, which would count twice. Where the "
            "token that was there stands beside the top k, TopKLogits.from_served(rows) keeps it once; in tensors mark "
            "the second with an index of -1"
        )
    filled = log_probs.detach().float().masked_fill(ids < 0, -torch.inf)
    rest = 0.0 if log_rest is None else (log_rest.detach().float() * (1 + _ROUNDED)).exp() * (ids >= 0).any(-1)
    if not ((filled.exp().sum(-1) + rest > 1.01) & keep).any():
        return  # and less, where they were rounded up
    total = (filled - _ROUNDED * filled.abs().nan_to_num(posinf=0)).exp().sum(-1) + rest
    if (bad := (total > 1.01) & keep).any():
        row = bad.nonzero()[0].tolist()
        _refuse_values(row, filled[bad], log_probs[tuple(row)], total[tuple(row)].item())


def _refuse_values(row: list[int], bad: Tensor, values: Tensor, total: float) -> None:
    there = bad[bad > -torch.inf]
    if (there >= 0).all() and (bad.clamp_min(0).sum(-1) <= 1.01).all():
        what = "these are probabilities; write log_probs=probabilities.log()"
    else:
        what = (
            "raw logits, perhaps? Write logits.log_softmax(-1) over all classes, then topk, or "
            "TopKLogits.of(logits, k), which does both"
        )
    raise ValueError(
        f"log_probs{row} are {[round(x, 4) for x in values.tolist()[:4]]}, of which the probabilities (with log_rest) "
        f"come to {total:.4g}, more than 1: {what}"
    )


def in_range(ids: Tensor, classes: int | None) -> bool:
    """Whether every index names a class, or an empty slot by -1."""
    if not ids.numel():
        return True
    low, high = ids.aminmax()
    return bool(low >= -1) and (classes is None or bool(high < classes))


def look_at_range(ids: Tensor, classes: int | None, keep: Tensor) -> None:
    """Raise for an index that names no class in a row that counts; -1 is an empty slot."""
    if in_range(ids, classes):
        return
    bad = (ids < -1) if classes is None else (ids < -1) | (ids >= classes)
    if (bad := bad & keep.unsqueeze(-1)).any():
        place = bad.nonzero()[0].tolist()
        among = "classes" if classes is None else f"{classes} classes, 0 to {classes - 1}"
        raise ValueError(
            f"indices{place} is {int(ids[tuple(place)])}, outside the {among}; an empty slot has an index of -1"
        )


def from_rows(rows: Sequence[Any], of_tokens: bool) -> tuple[Tensor, Tensor]:
    """Indices and log-probabilities of a text or a batch of texts, as a server gives them."""
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence) or not len(rows):
        raise TypeError(f"rows are a list with one row for each token, or a list of such lists, got {rows!r:.80}")
    batch = not any(_is_row(row) for row in rows)
    texts = [[_pairs(row) for row in text] for text in (rows if batch else [rows])]
    if of_tokens:
        if any(text and text[0] for text in texts):
            raise ValueError(
                "rows of tokens begin with None, as nothing is said of the first; write [None, *rows], or of='logits' "
                "where row t stands at the logits of position t already"
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
    """Whether this is one token's row; a text's first may be None, too."""
    if row is None or isinstance(row, Mapping):
        return True
    return isinstance(row, Sequence) and any(
        isinstance(x, Sequence) and not isinstance(x, str) and len(x) > 1 and isinstance(x[0], Real) for x in row
    )


def _pairs(row: Any) -> list[tuple[int, float]]:
    """Ids, each once, and log-probabilities, the most probable first."""
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
