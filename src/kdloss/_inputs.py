"""Which inputs of a batch a model gets: those that its forward names, or all if it takes `**kwargs`."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from kdloss.layers.names import unwrap
from kdloss.reduction import on_cpu

_EXPLICIT = 'kdloss.Teacher(teacher, inputs=lambda batch: {"input_ids": ...})'
PADDED_ROWS = {
    "student": "give it padded rows in place of packed ones",
    "teacher": f"give it padded rows, or say what it reads: {_EXPLICIT}",
}
_PACKING = "position_ids"  # a model that doesn't read these sees the documents of a packed row as one


def taken_by(model: Callable[..., Any]) -> tuple[list[str], bool]:
    """The keyword inputs that a model or a function names, and whether it takes others too.

    >>> taken_by(nn.Linear(2, 2))
    (['input'], False)
    """
    _, names, anything = _signature(model)
    return names, anything


def by_name(model: Callable[..., Any], args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call by their names in the model's forward, positional ones too as far as it names them.

    >>> by_name(nn.Linear(2, 2), (1,), {"mask": 2})
    {'input': 1, 'mask': 2}
    """
    return {**dict(zip(_signature(model)[0], args, strict=False)), **inputs} if args else dict(inputs)


def _signature(model: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """The inputs that can be given by position, those that can be given by name, and whether it takes others too."""
    function = unwrap(model).forward if isinstance(model, nn.Module) else model
    method: Any = getattr(function, "__func__", None)
    if isinstance(method, FunctionType):  # methods are cached by class; other functions would be kept alive
        return _of_method(method)
    if isinstance(schema := getattr(function, "schema", None), torch._C.FunctionSchema):  # TorchScript's
        names = [a.name for a in schema.arguments if a.name != "self"]
        return names, names, False
    return _parameters(function)


def _parameters(function: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return [], [], True
    places = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return places, named, any(p.kind is p.VAR_KEYWORD for p in known)


@lru_cache(maxsize=256)
def _of_method(method: FunctionType) -> tuple[list[str], list[str], bool]:
    places, names, anything = _parameters(method)
    return places[1:], [name for name in names if name not in places[:1]], anything  # without `self`


def named(model: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a model's forward takes; one that begins with "teacher_" has to be named there."""
    if not inputs:
        return {}
    names, anything = taken_by(model)
    return {k: v for k, v in inputs.items() if k in names or (anything and not k.startswith("teacher_"))}


def of_student(student: nn.Module, teachers: Iterable[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The student's inputs of a batch.

    Raises: TypeError for one that neither the student nor a teacher reads, ValueError for packed rows.
    """
    own = named(student, inputs)
    there = [] if len(own) == len(inputs) else [teacher for teacher in teachers if teacher is not None]
    models = [student, *(teacher.module for teacher in there)]
    rest = {} if any(t.inputs is not None for t in there) else inputs  # what a function of the batch reads isn't known
    if len(own) < len(rest) and (nobody := [k for k in rest if not any(k in named(m, inputs) for m in models)]):
        raise TypeError(
            f"no model reads {nobody}: {_told(models)}. Leave it out, or say what to make of it: "
            "kdloss.Teacher(teacher, inputs=lambda batch: ...)"
        )
    _refuse_unread_packing(student, inputs, "student")
    return own


def refuse_taken(models: Iterable[Callable[..., Any]], args: tuple[Any, ...], given: Sequence[str]) -> None:
    """Raise for a given keyword of the loss that a model names too and would not get, unless `args` fill its place."""
    for model in models:
        names = taken_by(model)[0]
        if lost := [name for name in given if name in names[len(args) :]]:
            name = lost[0]
            raise TypeError(
                f"{name}=... is a keyword of the loss, and the forward of {name_of(model)} has an input of that name, "
                f"too, which it would not get: it takes {names}. Pass the model's by position, model(x, {name}, "
                f"labels=...), or None in its place, and the loss's as {name}=..."
            )


def of_teacher(teacher: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's inputs, taken from those of the batch.

    Raises: ValueError if the teacher doesn't take an input that changes the meaning of the others.
    """
    own = named(teacher, inputs)
    _refuse_unread_packing(teacher, inputs, "teacher")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and "attention_mask" not in own and not mask.is_meta and not mask.bool().all():
        raise ValueError(
            f"the teacher ({_told([teacher])}) takes no attention_mask and would read padding as if it were text. If "
            f"that is right, say what it reads: {_EXPLICIT}"
        )
    return own


def refuse_other_order(student: nn.Module, teacher: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raise if an input given by position is one input to the student and another to a teacher that reads both."""
    places, names, _ = _signature(teacher)
    for ours, theirs, _ in zip(_signature(student)[0], places, args, strict=False):
        if ours != theirs and (ours in names or ours in ("attention_mask", _PACKING)):
            raise TypeError(
                f"an input given by position is {ours} to the student ({name_of(student)}) and {theirs} to the teacher "
                f"({name_of(teacher)}); give it by name: {ours}=..."
            )


def of_tokens(
    model: Callable[..., Any], ids: Tensor, mask: Tensor | None, rename: Callable[[Tensor], Tensor]
) -> Tensor:
    """A batch's token ids, translated to a teacher's own; where its mask is 0 they become the teacher's padding.

    The student's padding may have no counterpart. A teacher without a padding token gets a token of the batch there.
    """
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or not ids.numel():
        return rename(ids)
    there = mask.bool()
    own = rename(ids.where(there, ids.take(there.flatten().int().argmax())))
    config = getattr(unwrap(model), "config", None) if isinstance(model, nn.Module) else None
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < getattr(config, "vocab_size", 0):
        own = own.masked_fill(~there, padding)
    return own


def of_decoder(model: Callable[..., Any], labels: Any, rename: Callable[[Tensor], Tensor]) -> Any:
    """The labels from which an encoder-decoder makes its decoder inputs, translated to its own token ids."""
    config = getattr(unwrap(model), "config", None) if isinstance(model, nn.Module) else None
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return labels
    there = labels >= 0
    if not on_cpu(labels.device):  # indexing by `there` would wait for the device
        return rename(labels.where(there, labels.amax())).where(there, labels)
    own = labels.clone()
    own[there] = rename(labels[there])
    return own


def _refuse_unread_packing(model: Callable[..., Any], inputs: Mapping[str, Any], whose: str) -> None:
    if inputs.get(_PACKING) is None:
        return
    names, anything = taken_by(model)
    if _PACKING not in names and (not anything or _ignores_what_it_does_not_name(model)):
        raise ValueError(
            f"the {whose} ({_told([model])}) takes no position_ids, which separate the documents of a packed row: "
            f"it would read the others as context. Leave them out if rows aren't packed, or {PADDED_ROWS[whose]}"
        )


def _ignores_what_it_does_not_name(model: Callable[..., Any]) -> bool:
    """Whether a model may ignore unknown keywords: Hugging Face's models take any, and use few."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, nn.Module) and isinstance(
        unwrap(model), transformers.PreTrainedModel
    )  # fmt: skip


def _told(models: Iterable[Callable[..., Any]]) -> str:
    return ", ".join(f"{name_of(model)} takes {taken_by(model)[0]}" for model in models)


def name_of(model: Callable[..., Any]) -> str:
    """The name of a model's class inside its wrappers, or of a function."""
    return type(unwrap(model)).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "a function")
