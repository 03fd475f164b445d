"""The outputs of several teachers, or of one."""

from collections.abc import Iterator
from typing import Any


def listed(criterion: Any, teacher: Any) -> tuple[Iterator[Any], int]:
    """The teachers' outputs, one after the other, and how many there are (0: whoever runs them knows)."""
    if isinstance(teacher, Iterator):
        return teacher, 0
    if criterion.several and isinstance(teacher, tuple):
        teacher = list(teacher)
    if isinstance(teacher, list):
        if len(teacher) != 1:
            refuse_unread(criterion, len(teacher))
        return iter(teacher), len(teacher)
    if criterion.several and teacher is not None:
        raise TypeError(
            f"{type(criterion).__name__} reads a list of teacher outputs, got {type(teacher).__name__}; write "
            "[teacher], or take a criterion of one teacher"
        )
    return iter([teacher]), 1


def refuse_unread(criterion: Any, count: int) -> None:
    """Raise for a teacher that no term reads, and for a term whose teacher isn't there."""
    read = {k for term in criterion.terms.values() for k in term.teachers(count)}
    missing = sorted(set(range(count)) - read)
    if missing and count > 1:  # one that nobody reads is what a baseline has
        raise TypeError(
            f"{type(criterion).__name__} got {count} teachers, and no term reads teacher {missing[0]}, counted from 0; "
            "write MultiTeacherKD(...), Logits(teacher=[0, 1]) for their average, a term for each "
            "(Logits(teacher=1, name='second')), or pass one teacher"
        )
