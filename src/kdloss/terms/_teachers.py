"""The outputs of one or several teachers."""

from collections.abc import Iterator
from typing import Any


class Outputs:
    """The teachers' outputs, one after the other. It doesn't hold an output that was taken, unless it is put back."""

    def __init__(self, given: Iterator[Any]) -> None:
        self._given = given
        self._back: list[Any] = []

    def __next__(self) -> Any:
        return self._back.pop() if self._back else next(self._given)

    def back(self, output: Any) -> None:
        """Put an output back, so that it comes next again."""
        self._back.append(output)


def listed(criterion: Any, teacher: Any) -> tuple[Outputs, int]:
    """The teachers' outputs, one after the other, and their number (0 if they are run one by one by the caller)."""
    if isinstance(teacher, Iterator):
        return Outputs(teacher), 0
    if isinstance(teacher, tuple) and criterion.several:
        teacher = list(teacher)
    if isinstance(teacher, list):
        if len(teacher) != 1:
            refuse_unread(criterion, len(teacher))
        return Outputs(iter(teacher)), len(teacher)
    if teacher is not None and criterion.several:
        raise TypeError(
            f"{type(criterion).__name__} reads a list of teacher outputs, got {type(teacher).__name__}; write "
            "[teacher], or use a criterion for one teacher"
        )
    return Outputs(iter([teacher])), 1


def refuse_unread(criterion: Any, count: int) -> None:
    """Raise for a teacher that no term reads, and for a term whose teacher is missing."""
    read = {k for term in criterion.terms.values() for k in term.teachers(count)}
    missing = sorted(set(range(count)) - read)
    if missing and count > 1:  # a baseline has one teacher that no term reads
        raise TypeError(
            f"{type(criterion).__name__} got {count} teachers, and no term reads teacher {missing[0]}, counted from 0; "
            "write MultiTeacherKD(...), Logits(teacher=[0, 1]) for their average, a term for each "
            "(Logits(teacher=1, name='second')), or pass one teacher"
        )
