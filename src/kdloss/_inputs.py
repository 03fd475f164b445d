"""Which inputs of a batch a model gets: those that its forward names, or all if it takes `**kwargs`."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from kdloss.layers.names import unwrap
from kdloss.reduction import on_cpu

_PACKING = "position_ids"  # a model that doesn't read these sees the documents of a packed row as one


def taken_by(model: Callable[..., Any]) -> tuple[list[str], bool]:
    """The keyword inputs that a model or a function names, and whether it takes others too.

    >>> taken_by(nn.Linear(2, 2))
    (['input'], False)
    """
    function = unwrap(model).forward if isinstance(model, nn.Module) else model
    method: Any = getattr(function, "__func__", None)
    if isinstance(method, FunctionType):  # methods are cached by class; other functions would be kept alive
        names, anything = _of_method(method)
        return names[1:], anything
    if isinstance(schema := getattr(function, "schema", None), torch._C.FunctionSchema):  # TorchScript's
        return [a.name for a in schema.arguments if a.name != "self"], False
    return _parameters(function)


def _parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return [], True
    named = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in known)


_of_method = lru_cache(maxsize=256)(_parameters)


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
    _refuse_unread_packing(student, inputs, "student", "give it padded rows in place of packed ones")
    return own


def refuse_taken(models: Iterable[Callable[..., Any]], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Raise for a keyword of the loss that a model names, too, and would not get, unless `args` fill its place."""
    given = [name for name, x in keywords.items() if x is not None]
    for model in models if given else ():
        names = taken_by(model)[0]
        if lost := [name for name in given if name in names[len(args) :]]:
            name = lost[0]
            raise TypeError(
                f"{name}=... is a keyword of the loss, and the forward of {_name(model)} has an input of that name, "
                f"too, which it would not get: it takes {names}. Pass the model's by position, model(x, {name}, "
                f"labels=...), or None in its place, and the loss's as {name}=..."
            )


def of_teacher(teacher: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's inputs, taken from those of the batch.

    Raises: ValueError if the teacher doesn't take an input that changes the meaning of the others.
    """
    own, line = named(teacher, inputs), 'kdloss.Teacher(teacher, inputs=lambda batch: {"input_ids": ...})'
    _refuse_unread_packing(teacher, inputs, "teacher", f"give it padded rows, or say what it reads: {line}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and "attention_mask" not in own and not mask.is_meta and not mask.bool().all():
        raise ValueError(
            f"the teacher ({_told([teacher])}) takes no attention_mask and would read padding as if it were text. If "
            f"that is right, say what it reads: {line}"
        )
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


def _refuse_unread_packing(model: Callable[..., Any], inputs: Mapping[str, Any], whose: str, way: str) -> None:
    if inputs.get(_PACKING) is None:
        return
    names, anything = taken_by(model)
    if _PACKING not in names and (not anything or _ignores_what_it_does_not_name(model)):
        raise ValueError(
            f"the {whose} ({_told([model])}) takes no position_ids, which separate the documents of a packed row: "
            f"it would read the others as context. Leave them out if rows aren't packed, or {way}"
        )


def _ignores_what_it_does_not_name(model: Callable[..., Any]) -> bool:
    """Whether a model may ignore unknown keywords: Hugging Face's models take any, and use few."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, nn.Module) and isinstance(
        unwrap(model), transformers.PreTrainedModel
    )  # fmt: skip


def _told(models: Iterable[Callable[..., Any]]) -> str:
    return ", ".join(f"{_name(model)} takes {taken_by(model)[0]}" for model in models)


def _name(model: Callable[..., Any]) -> str:
    return type(unwrap(model)).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "a function")
