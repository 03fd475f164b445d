"""Measure whether a model keeps the documents of a packed row apart."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdloss._inputs import PADDED_ROWS, by_name, name_of
from kdloss._virtual import virtual_tokens
from kdloss.adapter import measuring, takes_input, without_cache
from kdloss.reduction import on_cpu
from kdloss.terms._outputs import find_logits

FEW = 4  # the first tokens of a document tell most of what stands before it


class Packing:
    """Measures once for each model and kind of batch whether it separates documents where `position_ids` start again.

    That it names `position_ids` doesn't tell: transformers separates documents in some models only, and only where
    there is neither a 2-D `attention_mask` nor a cache.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()  # True: measured

    def __reduce__(self) -> tuple[Any, ...]:
        return Packing, ()

    def check(
        self, key: Any, model: Callable[..., Any], args: tuple[Any, ...], inputs: Mapping[str, Any], whose: str
    ) -> None:
        """Raise ValueError if a model reads the documents of this batch as one; `key` stands for the model.

        On an accelerator, and in several processes, only the first batch is looked at: reading numbers makes the
        device wait, and every process has to make the same passes.
        """
        if len(args) < 2 and inputs.get("position_ids") is None:  # tokens come first
            return
        self._measured(key, model, args, inputs, whose)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _measured(
        self, key: Any, model: Callable[..., Any], args: tuple[Any, ...], inputs: Mapping[str, Any], whose: str
    ) -> None:
        given = by_name(model, args, inputs)
        if not _is_text(given) or len(given) < len(args) + len(inputs):
            return
        known = self._known.setdefault(key, {})
        kind = frozenset(name for name, x in given.items() if x is not None), bool(given.get("use_cache"))
        several = dist.is_available() and dist.is_initialized()
        if known.get(kind) or (kind in known and (several or not on_cpu(given["position_ids"].device))):
            return
        start = _last_start(given["position_ids"], given.get("attention_mask"))
        if start is not None or several:
            row, column = start or (0, given["position_ids"].shape[1] // 2)
            change = _change(model, given, row, column)
            if start is not None and change is not None:
                raise ValueError(_refusal(model, given, whose, start, change))
        known[kind] = start is not None


def _is_text(given: Mapping[str, Any]) -> bool:
    """Whether a batch has tokens and `position_ids` `[B, T]`, and no attention pattern that says what is seen."""
    positions, mask, tokens = given.get("position_ids"), given.get("attention_mask"), given.get(_tokens(given))
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor) or positions.is_meta or tokens.ndim < 2:
        return False
    there = positions.ndim == 2 and positions.shape[1] == tokens.shape[1] > 2 and len(tokens) > 0
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    return there and positions.shape[0] in (1, len(tokens)) and plain


def _tokens(given: Mapping[str, Any]) -> str:
    return "inputs_embeds" if given.get("input_ids") is None else "input_ids"


def _last_start(positions: Tensor, mask: Tensor | None) -> tuple[int, int] | None:
    """Row and column of the last document of two tokens or more that begins behind another one; padding is none."""
    starts = (positions[:, 1:-1] <= positions[:, :-2]) & (positions[:, 2:] == positions[:, 1:-1] + 1)
    if mask is not None and mask.shape[1] == positions.shape[1]:
        real = mask.bool()
        starts = starts & real[:, :-2] & real[:, 1:-1] & real[:, 2:]
    found = starts.nonzero().tolist()
    return (found[-1][0], found[-1][1] + 1) if found else None


def _change(model: Callable[..., Any], given: Mapping[str, Any], row: int, start: int) -> float | None:
    """By how much a document's output changes, relative to its size, with the order of the tokens before it.

    None if it is as much as rounding, or if the model shows nothing. The same numbers of all tokens stay in the batch,
    since some of them may stand for pictures.
    """
    name = _tokens(given)
    tokens = given[name]
    changed, before = tokens.clone(), tokens[row, :start]
    other = before.flip(0)
    changed[row, :start] = (before < 1).to(before.dtype) if torch.equal(other, before) else other
    index = torch.arange(start, min(start + FEW, tokens.shape[1]), device=tokens.device)
    few = {"logits_to_keep": index} if _keeps_few(model) else {}
    found = []
    with _measuring(model):
        for x in (tokens, changed):
            try:
                output = model(**without_cache(model, {**given, **few, name: x}))
            except (TypeError, ValueError, RuntimeError, IndexError):  # the step itself will tell
                return None
            rows = _rows(output, len(tokens))
            if rows is None:
                return None
            rows = rows[row] if few and rows.shape[1] == len(index) else rows[row, start - tokens.shape[1] :]
            found.append(rows[:FEW])
        limit = 1e-2 if _coarse(model, found[0]) else 1e-5
    one, two = (rows.float() for rows in found)
    change = ((one - two).norm() / (one - one.mean(-1, keepdim=True)).norm()).item()
    return change if change > limit else None


def _keeps_few(model: Callable[..., Any]) -> bool:
    return (
        isinstance(model, nn.Module)
        and takes_input(model, "logits_to_keep", by_name=True)
        and not virtual_tokens(model)
    )


def _measuring(model: Callable[..., Any]) -> AbstractContextManager[Any]:
    return measuring(model) if isinstance(model, nn.Module) else torch.no_grad()


def _rows(output: Any, batch: int) -> Tensor | None:
    """The logits `[B, T, V]` of an output, or its first tensor of such a shape."""
    tensors = (x for x in [find_logits(output), *tree_leaves(output)] if isinstance(x, Tensor))
    return next((x for x in tensors if x.ndim == 3 and len(x) == batch and x.is_floating_point()), None)


def _coarse(model: Callable[..., Any], rows: Tensor) -> bool:
    """Whether a model computes in 16 bits or fewer, where experts round by how many tokens they get."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    exact = torch.float32, torch.float64
    return torch.is_autocast_enabled(rows.device.type) or any(x.dtype not in exact for x in (rows, *weights))


def _refusal(
    model: Callable[..., Any], given: Mapping[str, Any], whose: str, start: tuple[int, int], change: float
) -> str:
    mask, cache = given.get("attention_mask") is not None, bool(given.get("use_cache"))
    beside = [name for name, there in (("attention_mask", mask), ("use_cache", cache)) if there]
    if not beside and not isinstance(model, nn.Module):
        beside = ["use_cache=True (of the model inside, where it is the default)"]
    leave = f"leave out {' and '.join(beside)}, beside which transformers separates no documents, or " if beside else ""
    return (
        f"the {whose} ({name_of(model)}) reads the documents of a packed row as one: position_ids start again at "
        f"{list(start)}, and the tokens before change its output there by {change:.2g} of its size; "
        f"{leave}{PADDED_ROWS[whose]}"
    )
