"""Pair layers by the size of their maps."""

from collections.abc import Sequence

Size = tuple[int, ...]


def pair_by_resolution(student_sizes: Sequence[Size], teacher_sizes: Sequence[Size]) -> list[tuple[int, int, float]]:
    """Pair the last block of the student with that of the teacher, at each resolution that both have.

    `student_sizes` and `teacher_sizes` hold the (height, width) of every block's map, or three numbers for volumes.
    Each of N pairs has the weight 1/N; pairs are in the order of the student's blocks.
    `FeatureKD(pairing="resolution")` uses it with sizes that `Distiller.prepare(student, **batch)` measures.

    Raises: ValueError if student and teacher have no resolution in common; the message lists all of them.

    >>> pair_by_resolution([(8, 8), (4, 4)], [(16, 16), (8, 8), (8, 8), (4, 4), (4, 4)])
    [(0, 2, 0.5), (1, 4, 0.5)]
    """
    student = {size: i for i, size in enumerate(student_sizes)}  # the last block of each size wins
    teacher = {size: i for i, size in enumerate(teacher_sizes)}
    common = sorted((student[size], teacher[size]) for size in student if size in teacher)
    if not common:
        raise ValueError(
            f"no resolution is common to student, {list(student)}, and teacher, {list(teacher)}; feed both "
            "images of one size, or name pairs yourself: pairing=[(student_block, teacher_block), ...]"
        )
    return [(s, t, 1 / len(common)) for s, t in common]
