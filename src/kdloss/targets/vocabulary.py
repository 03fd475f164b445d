"""Compare models whose vocabularies differ: by their common prefix, or by the tokens they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int64
from torch import Tensor

from kdloss.reduction import on_cpu
from kdloss.targets.kinds import AnyLogits, Classes, chosen_classes, known_classes


def truncate(student: AnyLogits, teacher: AnyLogits) -> tuple[AnyLogits, AnyLogits]:
    """Cut both to their common prefix, renormalised: for models that pad the same vocabulary to different sizes.

    Student and teacher are logits of any kind.

    Raises: ValueError for top-k logits without their `vocabulary`.

    >>> student, teacher = truncate(torch.zeros(2, 50), torch.zeros(2, 64))
    >>> student.shape, teacher.shape
    (torch.Size([2, 50]), torch.Size([2, 50]))
    """
    mine, theirs = _prefix(student, teacher)
    return chosen_classes(student, mine), chosen_classes(teacher, theirs)


def _prefix(student: AnyLogits, teacher: AnyLogits) -> tuple[Classes, Classes]:
    """The shared classes of student and teacher, in the form that the engine reads."""
    s, t = (known_classes(x) for x in (student, teacher))
    if s == t:
        return None, None
    return slice(t) if s > t else None, slice(s) if t > s else None


vars(truncate)["shared"] = _prefix


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The tokens that two vocabularies share, by their id in each.

    Call it with student and teacher logits of any kind; it returns both over the shared tokens, over which they are
    renormalised.

    Shapes: student_ids and teacher_ids `[n]`, int64.

    Raises: ValueError for lists of different lengths or empty lists, and for an id that is negative or in two pairs.

    >>> shared = TokenMap.of({"a": 0, "b": 1, "c": 2}, {"<s>": 0, "b": 1, "a": 2})
    >>> shared.student_ids.tolist(), shared.teacher_ids.tolist()
    ([0, 1], [2, 1])
    """

    student_ids: Int64[Tensor, " shared"]
    teacher_ids: Int64[Tensor, " shared"]

    def __post_init__(self) -> None:
        if self.student_ids.shape != self.teacher_ids.shape or self.student_ids.ndim != 1:
            raise ValueError(
                f"student_ids {tuple(self.student_ids.shape)} and teacher_ids "
                f"{tuple(self.teacher_ids.shape)} must be two lists of one length, one pair per token"
            )
        if not len(self.student_ids):
            raise ValueError("the two vocabularies share no token; nothing can be compared")
        if not self.student_ids.is_meta:
            _once("student", self.student_ids, "teacher", self.teacher_ids)
            _once("teacher", self.teacher_ids, "student", self.student_ids)

    @classmethod
    def of(cls, student_tokenizer: Any, teacher_tokenizer: Any) -> "TokenMap":
        """Pair equal token strings of `student_tokenizer` and `teacher_tokenizer`, and the tokens that end a text.

        Each is a tokenizer, or a dict `{token: id}`.
        """
        s, t = _vocabulary(student_tokenizer), _vocabulary(teacher_tokenizer)
        pairs = {s[token]: t[token] for token in s.keys() & t.keys()}
        end, teacher_end = (getattr(x, "eos_token_id", None) for x in (student_tokenizer, teacher_tokenizer))
        if end is not None and teacher_end is not None and end not in pairs:
            # the student's token with the same string as the teacher's end token loses its pair
            pairs = {i: j for i, j in pairs.items() if j != teacher_end} | {end: teacher_end}
        ids = sorted(pairs.items())
        return cls(torch.tensor([i for i, _ in ids]).long(), torch.tensor([j for _, j in ids]).long())

    def __call__(self, student: AnyLogits, teacher: AnyLogits) -> tuple[AnyLogits, AnyLogits]:
        """Student and teacher over the shared tokens, in the same order."""
        s, t = self.shared(student, teacher)
        return chosen_classes(student, s), chosen_classes(teacher, t)

    def shared(self, student: AnyLogits, teacher: AnyLogits) -> tuple[Tensor, Tensor]:
        """The shared tokens' ids in `student`'s and in `teacher`'s vocabulary, on the device of their logits."""
        device = student.device
        if self.student_ids.device == self.teacher_ids.device == device or torch.compiler.is_compiling():
            return self.student_ids.to(device), self.teacher_ids.to(device)
        return self._on(device)[:2]

    def to_teacher(self, input_ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Translate `input_ids` from the student's ids to the teacher's, for the teacher's forward pass.

        Raises: ValueError for tokens that the teacher doesn't have. On an accelerator only the first call checks,
        since the check needs a synchronisation.
        """
        first = input_ids.device not in _there.get(self, {})
        table = self._on(input_ids.device)[2]
        ids = table[input_ids.clamp(-1, len(table) - 1)]  # the last entry, -1, is for ids that are no token
        if (first or on_cpu(ids.device)) and (ids < 0).any():
            unknown = sorted(set(input_ids[ids < 0].tolist()))
            raise ValueError(
                f"tokens {unknown[:10]} of the student have no counterpart in the teacher's vocabulary; "
                "texts that hold them have to be tokenised for the teacher by its own tokenizer"
            )
        return ids

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Both lists, and a table of the teacher's id for each student id (-1: none), copied to each device once."""
        known = _there.setdefault(self, {})
        if device not in known:
            mine, theirs = self.student_ids.to(device), self.teacher_ids.to(device)
            table = mine.new_full((int(self.student_ids.max()) + 2,), -1)
            table[mine] = theirs
            known[device] = mine, theirs, table
        return known[device]


_there: WeakKeyDictionary[TokenMap, dict[torch.device, tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


def _once(whose: str, ids: Tensor, other: str, others: Tensor) -> None:
    """Raise where a class is in two pairs: it would count twice on one side."""
    found = dict[int, int]()
    for i, j in zip(ids.tolist(), others.tolist(), strict=True):
        if i < 0:
            raise ValueError(f"{whose}_ids has {i}; ids are 0 or more: leave out what has no counterpart")
        if i in found:
            raise ValueError(
                f"{whose} id {i} is paired twice, with {other} ids {found[i]} and {j}; a class is compared with one "
                "other: keep one of the two pairs"
            )
        found[i] = j


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    found: Mapping[str, int] = tokenizer if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
    return found
