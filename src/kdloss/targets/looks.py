"""Check the numbers of top-k logits."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss.reduction import on_cpu

if TYPE_CHECKING:
    from kdloss.targets.top_k import TopKLogits

# The relative rounding of log-probabilities in bfloat16.
_ROUNDED = 2.0**-8


def free_to_look(*tensors: Tensor | None) -> bool:
    """Whether the numbers can be read without a synchronisation, and outside of a traced graph."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    there = [t for t in tensors if t is not None]
    return all(type(t) in (Tensor, torch.nn.Parameter) and on_cpu(t.device) for t in there)


def look_at_first(rows: "TopKLogits") -> None:
    """Raise for impossible numbers when rows are given, and note whether all rows were checked.

    Rows of padding are left to `look_again`, which knows whether they count.
    """
    if free_to_look(rows.indices, rows.log_probs, rows.log_rest):
        ids = rows.ids()
        padded = padding(ids, rows.log_probs)
        look(ids, rows.log_probs, rows.log_rest, rows.vocabulary, ~padded)
        object.__setattr__(rows, "_right", not padded.any().item())


def look_again(rows: "TopKLogits", classes: int | None, keep: Tensor | None = None, *, always: bool = False) -> None:
    """Raise for impossible numbers in a row that counts; on accelerators only if `always`."""
    if _looked_at(rows, classes) or not (always or free_to_look(rows.indices, rows.log_probs, keep)):
        return
    keep = torch.ones_like(rows.log_probs[..., 0], dtype=torch.bool) if keep is None else keep
    if getattr(rows, "_right", False):
        look_at_range(rows.ids(), classes, keep)
    else:
        look(rows.ids(), rows.log_probs, rows.log_rest, classes, keep)


def _looked_at(rows: "TopKLogits", classes: int | None) -> bool:
    """Whether all rows were checked already, for this number of classes."""
    known = rows.vocabulary
    return getattr(rows, "_right", False) and (classes is None or (known is not None and known <= classes))


def padding(ids: Tensor, log_probs: Tensor) -> Tensor:
    """Rows `[...]` of padding: the same class and the same number in all slots, or NaN."""
    there = (ids[..., 0] == ids[..., -1]) & (ids[..., 0] >= 0) & (ids.shape[-1] > 1)
    if there.any():
        there &= (ids == ids[..., :1]).all(-1) & (log_probs == log_probs[..., :1]).all(-1)
    nothing = log_probs.sum(-1).isnan()  # also for two opposite infinities
    return there | (nothing & log_probs.isnan().any(-1) if nothing.any() else nothing)


def look(ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, classes: int | None, keep: Tensor) -> None:
    """Raise, in rows that count, for a class twice or out of range, and for numbers that are no log-probabilities."""
    look_at_range(ids, classes, keep)
    in_order = ids.sort(-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0) & keep.unsqueeze(-1)
    if twice.any():
        *row, slot = twice.nonzero()[0].tolist()
        raise ValueError(
            f"indices{row} has the class {int(in_order[tuple(row)][slot])} twice, which would count twice. Where a "
            "server lists the actual token beside the top k, TopKLogits.from_served(rows) keeps it once; in tensors "
            "set the second index to -1"
        )
    filled = log_probs.detach().float().masked_fill(ids < 0, -torch.inf)
    rest = 0.0 if log_rest is None else (log_rest.detach().float() * (1 + _ROUNDED)).exp() * (ids >= 0).any(-1)
    if not ((filled.exp().sum(-1) + rest > 1.01) & keep).any():
        return
    # The least total that they may have had before they were rounded.
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
        f"log_probs{row} are {[round(x, 4) for x in values.tolist()[:4]]}; their probabilities (with log_rest) "
        f"come to {total:.4g}, more than 1: {what}"
    )


def in_range(ids: Tensor, classes: int | None) -> bool:
    """Whether every index is a class, or -1 for an empty slot."""
    if not ids.numel():
        return True
    low, high = ids.aminmax()
    return bool(low >= -1) and (classes is None or bool(high < classes))


def look_at_range(ids: Tensor, classes: int | None, keep: Tensor) -> None:
    """Raise for an index out of range in a row that counts; -1 is an empty slot."""
    if in_range(ids, classes):
        return
    bad = (ids < -1) if classes is None else (ids < -1) | (ids >= classes)
    if (bad := bad & keep.unsqueeze(-1)).any():
        place = bad.nonzero()[0].tolist()
        among = "classes" if classes is None else f"{classes} classes, 0 to {classes - 1}"
        raise ValueError(
            f"indices{place} is {int(ids[tuple(place)])}, outside the {among}; an empty slot has an index of -1"
        )
