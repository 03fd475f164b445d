"""Which teacher block each chosen student block is held against."""

from collections.abc import Callable, Sequence

import torch

from kdloss.layers.select import index

Pairing = str | Sequence[tuple[int, int]] | Callable[[list[int], int, int], Sequence[tuple[int, int]]]
PAIRINGS = ("uniform", "same", "first", "last", "reverse", "random", "kept")


def pair(
    selected: list[int],
    student_depth: int,
    teacher_depth: int,
    pairing: Pairing = "uniform",
    kept: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """Pairs (student block, teacher block) for the selected student blocks.

    - "uniform": the same relative depth, last to last: block i of n against round(i (m-1)/(n-1)).
    - "same": the same index. "first", "last": the teacher's first or last blocks, in order.
    - "reverse": the partners of "uniform" in reverse order, a control experiment.
    - "random": teacher blocks drawn anew at every call, in ascending order, from torch's
      generator (Haidar et al. 2022, "RAIL-KD", arXiv:2109.10164).
    - "kept": for a student made of the teacher's own blocks `kept`: each against the teacher's
      block just before the next kept one, the last against the teacher's last.
    - a list of pairs, or a callable `(selected, student_depth, teacher_depth) -> pairs`.

    Raises: ValueError for an unknown pairing, a block out of range, a pair or a student block given
    twice, a teacher too shallow for the pairing, or "kept" without fitting `kept` blocks;
    TypeError for pairs that are not pairs of integers.

    >>> pair([0, 1, 2, 3], 4, 12)
    [(0, 0), (1, 4), (2, 7), (3, 11)]
    >>> pair([0, 1, 2], 3, 6, "kept", kept=[0, 2, 5])
    [(0, 1), (1, 4), (2, 5)]
    """
    if not isinstance(pairing, str):
        pairs = pairing(selected, student_depth, teacher_depth) if callable(pairing) else pairing
        return _checked(list(pairs), student_depth, teacher_depth)
    known(pairing)
    if pairing == "kept":
        return list(zip(selected, _after(selected, student_depth, teacher_depth, kept), strict=True))
    count = len(selected)
    if pairing in ("first", "last", "random") and count > teacher_depth:
        raise ValueError(
            f"pairing={pairing!r} needs one teacher block for each of the {count} selected student "
            f"blocks, the teacher has {teacher_depth}; write pairing='uniform', or select fewer layers"
        )
    if pairing == "same" and max(selected) >= teacher_depth:
        raise ValueError(
            f"pairing='same' holds student block {max(selected)} against teacher block "
            f"{max(selected)}, but the teacher has {teacher_depth} blocks; write pairing='uniform'"
        )
    partners: dict[str, Callable[[], Sequence[int]]] = {
        "uniform": lambda: [_relative(i, student_depth, teacher_depth) for i in selected],
        "same": lambda: selected,
        "first": lambda: range(count),
        "last": lambda: range(teacher_depth - count, teacher_depth),
        "reverse": lambda: [_relative(i, student_depth, teacher_depth) for i in reversed(selected)],
        "random": lambda: sorted(torch.randperm(teacher_depth)[:count].tolist()),
    }
    return list(zip(selected, partners[pairing](), strict=True))


def known(pairing: str) -> None:
    """A pairing by its name."""
    if pairing not in PAIRINGS:
        raise ValueError(
            f"pairing={pairing!r} is unknown; choose one of {list(PAIRINGS)}, or give (student, "
            "teacher) pairs or a callable"
        )


def _relative(i: int, student_depth: int, teacher_depth: int) -> int:
    if student_depth == 1:
        return teacher_depth - 1
    steps = student_depth - 1
    return (2 * i * (teacher_depth - 1) + steps) // (2 * steps)  # rounds halves up, in integers


def _after(
    selected: list[int], student_depth: int, teacher_depth: int, kept: Sequence[int] | None
) -> list[int]:
    if kept is None:
        raise ValueError(
            "pairing='kept' is for a student made of this teacher's own blocks by "
            "kdloss.keep_blocks(teacher, blocks), prepared by Distiller.prepare(student); "
            "write pairing='uniform' for any other"
        )
    if len(kept) != student_depth or max(kept) >= teacher_depth:
        raise ValueError(
            f"the student was made of blocks {list(kept)}, which does not fit its {student_depth} "
            f"blocks and the teacher's {teacher_depth}; is this the teacher it was made from?"
        )
    before_next = [following - 1 for following in kept[1:]] + [teacher_depth - 1]
    return [before_next[i] for i in selected]


def _checked(pairs: list[tuple[int, int]], student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    if not pairs or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        raise TypeError(f"pairing must be (student, teacher) pairs, like [(0, 1), (3, 7)], got {pairs}")
    fixed = [(index(s, student_depth, "student "), index(t, teacher_depth, "teacher ")) for s, t in pairs]
    students = [s for s, _ in fixed]
    if len(set(students)) < len(students):
        raise ValueError(f"pairing={pairs} names a student block twice")
    return fixed
