"""One forward pass of a model, with what the terms of a sum capture."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from kdloss._capture import Captured, Located, Request, record
from kdloss._layout import ends
from kdloss._virtual import without_virtual_tokens
from kdloss.adapter import without_cache
from kdloss.layers.layer_map import flat_names
from kdloss.lazy_head import LazyHeads
from kdloss.teacher import moved
from kdloss.terms import Reads

Requests = Mapping[Any, Request]


class Passes:
    """Runs models; remembers for each where its modules are, and what it does to its head's output."""

    def __init__(self) -> None:
        self.heads, self.located = LazyHeads(), Located()

    def __call__(
        self,
        model: nn.Module,
        requests: Requests,
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        *,
        stop: bool = False,
        why_full: str | None = None,
    ) -> Captured:
        """One pass. `stop` ends it early; `why_full` is the reason why its logits have to be a tensor, if they do."""
        if inputs.get("labels") is not None:
            why_full = "it is given labels, from which it computes its own loss"
        given = args, without_cache(model, inputs)
        recording = record(model, requests, stop=stop, located=self.located, given=given) if requests else nullcontext()
        with (
            recording as recorded,
            nullcontext() if stop else self.heads.without_logits(model, why_full) as head,
        ):
            # not nullcontext(Captured()): torch 2.4 compiles only the empty one
            seen = Captured() if recorded is None else recorded
            seen.output = model(*args, **given[1])
            if recorded is None:
                seen.head = ends(model)
        if head is None or self.heads.finish(model, head, seen.output):

            def module(key: Any) -> nn.Module:
                return self.located.find(model, requests[key].name, requests[key].blocks)

            without_virtual_tokens(model, seen, args, inputs, module)
            _viewed(seen)
            return seen
        return self(model, requests, args, inputs, stop=stop, why_full=why_full)


def requests(reads: Mapping[str, Reads], side: str) -> Requests:
    """The requests to capture features of one side, "student" or "teacher", by term and name."""
    found = {}
    for term, r in reads.items():
        if not r.pairs:
            continue
        take = r.take if side == "student" else r.teacher_take
        for name in flat_names([s if side == "student" else t for s, t, _ in r.pairs]):
            one = take.get(name) if isinstance(take, Mapping) else take
            found[term, name] = Request(name, r.blocks, take=one, shape_alone=r.shapes)
    return found


def brought(seen: Captured, device: torch.device | None) -> Captured:
    """A teacher's output and features, moved to the student's device; None leaves them where they are."""
    if device is None:
        return seen
    seen.output = moved(seen.output, device)
    for view in seen.views.values():
        view.features, view.output = moved(view.features, device), seen.output
    return seen


def _viewed(seen: Captured) -> None:
    """Group what was captured by term, as views."""
    features: Mapping[Any, Any] = seen.features
    for (term, name), feature in features.items():
        view = seen.views.setdefault(term, Captured())
        view.features[name], view.output, view.head = feature, seen.output, seen.head
        view.tells[name] = seen.tells[term, name]
