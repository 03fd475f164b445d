"""The names of a model's classes (`config.id2label`), by which classes in different orders are paired."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture import Captured
from kdloss.layers.names import attribute, unwrap
from kdloss.targets import TopKLogits
from kdloss.targets.kinds import AnyLogits, chosen_classes, classes

_log = logging.getLogger("kdloss")
_NAMES = "vocabulary=kdloss.TokenMap.of(student.config.label2id, teacher.config.label2id)"


@dataclass(frozen=True)
class Classes:
    """The classes of a student and of one of its teachers, by name."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]

    @property
    def alike(self) -> bool:
        """Whether both have the same classes, in any order."""
        return set(self.student) == set(self.teacher)

    def in_students_order(self, logits: AnyLogits) -> AnyLogits:
        """A teacher's logits over its classes, in the student's order; other logits as they are.

        Raises: ValueError where the names differ.
        """
        if classes(logits) != len(self.teacher) or self.student == self.teacher:
            return logits
        if not self.alike:
            raise ValueError(self._differ())
        return chosen_classes(logits, _order(self.student, self.teacher, logits.device))

    def _differ(self) -> str:
        alone = [[x for x in a if x not in b] for a, b in ((self.student, self.teacher), (self.teacher, self.student))]
        who = [
            f"{whose} alone has {names[:3]}"
            for whose, names in zip(("the student", "the teacher"), alone, strict=True)
            if names
        ]
        shared = len(set(self.student) & set(self.teacher))
        way = (
            f"compare over the {shared} classes that both have: {_NAMES}"
            if shared
            else "where they mean the same, give both models the same names: student.config.id2label = {0: ..., 1: ...}"
        )
        return (
            f"the student has {len(self.student)} classes and the teacher {len(self.teacher)}, by config.id2label, and "
            f"{' and '.join(who)}; {way}"
        )


@lru_cache(maxsize=16)
def _order(student: tuple[str, ...], teacher: tuple[str, ...], device: torch.device) -> Tensor:
    """The teacher's index of each of the student's classes; copied to each device once."""
    with torch.inference_mode(False):
        return torch.tensor([teacher.index(name) for name in student], device=device)


class Named:
    """Reads the names of both models' classes, and logs once what was concluded from them."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, k: int, student: nn.Module, teacher: Any) -> Classes | None:
        """The classes of the student and of teacher k (a model or a stored output), if both name their classes."""
        theirs = _folded(class_names(teacher))
        if theirs is None:
            return None
        ours = _folded(class_names(student))
        if ours is None:
            if len(theirs) == getattr(getattr(unwrap(student), "config", None), "num_labels", None):
                self._say(
                    f"teacher {k} names its classes ({_some(theirs)}) and the student doesn't: both are assumed to be "
                    "in the same order; write student.config.id2label = {0: ..., 1: ...} to have the orders compared"
                )
            return None
        found = Classes(ours, theirs)
        if ours != theirs and found.alike:
            self._say(f"teacher {k} has the student's classes in another order: paired by name, {_some(ours)}")
        return found

    def stored(self, k: int, student: nn.Module, said: Any) -> Any:
        """A stored teacher's output, with the names of its classes if it has some."""
        found = self(k, student, said) if isinstance(said, TopKLogits) else None
        if found is None:
            return said
        seen = Captured()
        seen.output, seen.classes = said, found
        return seen

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.info(message)


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model's classes are tokens; False only if it says that it has no output embeddings."""
    found: Any = getattr(unwrap(model), "get_output_embeddings", None)
    return not callable(found) or found() is not None


def class_names(model: Any) -> tuple[str, ...] | None:
    """The names of a model's classes in order; None if there are none, or only Hugging Face's LABEL_0, LABEL_1."""
    if isinstance(model, TopKLogits):
        return model.classes
    if not isinstance(model, nn.Module):
        return None
    named: Any = getattr(attribute(unwrap(model), "config"), "id2label", None)
    return _in_order(tuple(named.items())) if isinstance(named, dict) else None


@lru_cache(maxsize=16)
def _in_order(named: tuple[tuple[Any, Any], ...]) -> tuple[str, ...] | None:
    if {str(i) for i, _ in named} != set(map(str, range(len(named)))):
        return None
    names = tuple(str(name) for _, name in sorted((int(i), name) for i, name in named))
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


@lru_cache(maxsize=16)
def _folded(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Names in lower case, if they are still distinct."""
    folded = None if names is None else tuple(name.casefold() for name in names)
    return names if folded is None or len(set(folded)) < len(folded) else folded


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
