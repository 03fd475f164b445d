"""What to do where student and teacher count their vocabularies differently."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int64
from torch import Tensor

from kdloss.reduction import on_cpu
from kdloss.targets.kinds import AnyLogits, Classes, chosen_classes, classes


def truncate(student: AnyLogits, teacher: AnyLogits) -> tuple[AnyLogits, AnyLogits]:
    """Both over their common prefix, renormalised: for vocabularies of which one begins with the other.

    Student and teacher logits of any kind, as of models that pad the same vocabulary to different sizes.

    >>> student, teacher = truncate(torch.zeros(2, 50), torch.zeros(2, 64))
    >>> student.shape, teacher.shape
    (torch.Size([2, 50]), torch.Size([2, 50]))
    """
    mine, theirs = _prefix(student, teacher)
    return chosen_classes(student, mine), chosen_classes(teacher, theirs)


def _prefix(student: AnyLogits, teacher: AnyLogits) -> tuple[Classes, Classes]:
    """Which classes of each they share, as the engine asks for them."""
    s, t = classes(student), classes(teacher)
    if s is None or t is None or s == t:
        return None, None
    return slice(t) if s > t else None, slice(s) if t > s else None


vars(truncate)["shared"] = _prefix


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Tokens that two vocabularies share, by their id in each; both sides are renormalised over them.

    Called with student and teacher logits of any kind, it returns both over the shared tokens.

    Shapes: student_ids and teacher_ids `[n]`, int64.

    Raises: ValueError for lists of different lengths or none, and for an id that is negative or in two pairs.

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
            # whoever bears the name of the teacher's has to do without it
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
        """The teacher's ids for `input_ids`, the student's: what the teacher's forward pass is given.

        Raises: ValueError for tokens that the teacher doesn't have. An accelerator, which has to be waited for, is
        asked in the first call only.
        """
        first = input_ids.device not in _there.get(self, {})
        table = self._on(input_ids.device)[2]
        ids = table[input_ids.clamp(-1, len(table) - 1)]  # the last entry stands for all that is no token
        if (first or on_cpu(ids.device)) and (ids < 0).any():
            unknown = sorted(set(input_ids[ids < 0].tolist()))
            raise ValueError(
                f"tokens {unknown[:10]} of the student have no counterpart in the teacher's vocabulary; "
                "texts that hold them have to be tokenised for the teacher by its own tokenizer"
            )
        return ids

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Both lists, and the teacher's id of each of the student's (-1: none), on a device, copied there once."""
        known = _there.setdefault(self, {})
        if device not in known:
            mine, theirs = self.student_ids.to(device), self.teacher_ids.to(device)
            table = mine.new_full((int(self.student_ids.max()) + 2,), -1)
            table[mine] = theirs
            known[device] = mine, theirs, table
        return known[device]


_there: WeakKeyDictionary[TokenMap, dict[torch.device, tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


def _once(whose: str, ids: Tensor, other: str, others: Tensor) -> None:
    """No class stands in two pairs: it would count twice on one side, or take two classes' mass for one's."""
    found = dict[int, int]()
    for i, j in zip(ids.tolist(), others.tolist(), strict=True):
        if i < 0:
            raise ValueError(f"{whose}_ids has {i}; ids are 0 or more: leave out what has no counterpart")
        if i in found:
            raise ValueError(
                f"{whose} id {i} is paired twice, with {other} ids {found[i]} and {j}; a class is held against one "
                "other: keep one of the two pairs"
            )
        found[i] = j


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    found: Mapping[str, int] = tokenizer if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
    return found
