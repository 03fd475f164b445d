"""One forward pass of a model, and what the terms of a sum see of it."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture import Captured, Located, Request, record
from kdloss.adapter import masks, without_cache
from kdloss.layers.layer_map import parts
from kdloss.lazy_head import LazyHeads
from kdloss.teacher import moved
from kdloss.terms import Plan, Reads
from kdloss.terms._outputs import find_logits

Requests = Mapping[Any, Request]


class Passes:
    """Runs models; remembers of each where its modules are, and what it does to its head's output."""

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
        why_whole: str | None = None,
    ) -> Captured:
        """One pass, ended early where `stop` says so; `why_whole` its logits must be a tensor, if they must."""
        with (
            record(model, requests, stop=stop, located=self.located) as seen,
            nullcontext() if stop else self.heads.apart(model, why_whole) as head,
        ):
            seen.output = model(*args, **without_cache(model, inputs))
        if head is None or self.heads.finish(model, head, seen.output):
            return _viewed(seen)
        return self(model, requests, args, inputs, stop=stop, why_whole=why_whole)


def requests(reads: Mapping[str, Reads], side: str) -> Requests:
    """What is captured of one side, "student" or "teacher", by term and name."""
    found = {}
    for term, r in reads.items():
        take = r.take if side == "student" else r.teacher_take
        for name in parts([s if side == "student" else t for s, t, _ in r.pairs or ()]):
            one = take.get(name) if isinstance(take, Mapping) else take
            found[term, name] = Request(name, r.blocks, take=one, shape_alone=r.shapes)
    return found


def brought(seen: Captured, device: torch.device | None) -> Captured:
    """What a teacher elsewhere gave, on the student's device; None leaves it."""
    if device is None:
        return seen
    seen.output = moved(seen.output, device)
    for view in seen.views.values():
        view.features, view.output = moved(view.features, device), seen.output
    return seen


def all_masks(
    student: nn.Module, seen: Captured, plan: Plan, inputs: dict[str, Any], labels: Any, mask: Tensor | None
) -> dict[str, Any]:
    """The mask of the labels' positions, and those of features that stand elsewhere, by term."""
    logits = find_logits(seen.output)
    positions = None if logits is None else logits.shape[:-1]
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        positions = labels.shape
    own: dict[str, Tensor | None] = {}
    for name, reads in plan.reads.items():
        if reads.pairs:
            first = next(iter(seen.of(name).values())) if "encoder" in (reads.blocks or "") else None
            own[name] = masks(student, inputs, mask, positions, first)[1]
    settings: dict[str, Any] = {"mask": masks(student, inputs, mask, positions, None)[0]}
    return settings | {"feature_mask": own} if own else settings


def _viewed(seen: Captured) -> Captured:
    """What was captured, by name for each term."""
    features: Mapping[Any, Any] = seen.features
    for (term, name), feature in features.items():
        view = seen.views.setdefault(term, Captured())
        view.features[name], view.output = feature, seen.output
    return seen
