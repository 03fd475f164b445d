"""Pair each selected student block with teacher blocks, with weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdloss.layers.select import index
from kdloss.reduction import takes

Pairs = list[tuple[int, int, float]]
Given = Sequence[tuple[int, int]] | Sequence[tuple[int, int, float]]
Features = Mapping[int, Tensor]
Learned = Callable[[Features, Features, Mapping[tuple[int, int], Tensor]], Sequence[tuple[int, int, float | Tensor]]]
Pairing = str | Given | Callable[[list[int], int, int], Given] | Learned
PAIRINGS = ("uniform", "same", "first", "last", "reverse", "random", "kept", "all_to_one", "resolution")


def pair(
    selected: list[int],
    student_depth: int,
    teacher_depth: int,
    pairing: Pairing = "uniform",
    kept: Sequence[int] | None = None,
) -> list[tuple[int, int, float]]:
    r"""Pairs (student block, teacher block, weight) for the selected student blocks.

    Each of N pairs has the weight 1/N, so that the sum $\sum_i w_i d_i$ of their distances is the mean, unless
    the pairs come with weights of their own. `pairing` is one of:

    - "uniform": equal relative depth, last to last. Block i of n student blocks is paired with teacher block
      round(i (m-1)/(n-1)) of m.
    - "same": the same index. "first", "last": the teacher's first or last blocks, in order.
    - "reverse": the partners of "uniform" in reverse order, for a control experiment.
    - "random": teacher blocks drawn at every call, in ascending order, from torch's generator. This is the draw of
      Haidar et al. 2022, "RAIL-KD", arXiv:2109.10164, at every step instead of every epoch. Their pooling over
      positions and their normalisation are not part of it; choose a distance for these.
    - "all_to_one": every selected block with the teacher's last block.
    - "kept": for a student that was made from the teacher's own blocks `kept`. Each block is paired with the
      teacher's block just before the next kept one, and the last with the teacher's last.
    - "resolution": for CNNs, by the size of the maps; see `kdloss.layers.pair_by_resolution`.
    - a list of pairs, or a callable `(selected, student_depth, teacher_depth) -> pairs`. Pairs are
      (student, teacher) or (student, teacher, weight). Weights are used as they are, whatever their sum; with
      weights one student block may have several teacher blocks.
    - a learned pairing, like `kdloss.layers.pair_by_emd`: a callable with a parameter called `distances`, which
      `FeatureKD` calls at every step. For it this function returns all pairs that it may choose from.

    Raises: ValueError for an unknown pairing, a block out of range, a pair given twice, a student block given twice
    without weights, weights that are negative, not finite or all 0, a teacher with too few blocks for the pairing, or
    "kept" without `kept` blocks that fit; TypeError for pairs that are not pairs of integers, or if only some of them
    have weights.

    >>> pair([0, 1, 2, 3], 4, 12)
    [(0, 0, 0.25), (1, 4, 0.25), (2, 7, 0.25), (3, 11, 0.25)]
    >>> pair([1, 3], 4, 6, "kept", kept=[0, 2, 4, 5])
    [(1, 3, 0.5), (3, 5, 0.5)]
    >>> pair([], 4, 12, [(3, 10, 0.2), (3, -1, 0.8)])
    [(3, 10, 0.2), (3, 11, 0.8)]
    """
    if learned(pairing):
        return _equal_weights(*zip(*[(s, t) for s in selected for t in range(teacher_depth)], strict=True))
    if not isinstance(pairing, str):
        plain: Any = pairing
        given = list(plain(selected, student_depth, teacher_depth) if callable(plain) else plain)
        return check_distinct(
            [
                (index(s, student_depth, "student "), index(t, teacher_depth, "teacher "), w)
                for s, t, w in with_weights(given)
            ],
            given,
        )
    check_pairing(pairing)
    if pairing == "kept":
        return _equal_weights(selected, _before_next_kept(selected, student_depth, teacher_depth, kept))
    if pairing == "resolution":
        raise ValueError(
            "pairing='resolution' needs the sizes of maps, which are measured on a batch: write "
            "model.prepare(**batch) with a kdloss.Distillation, distill.prepare(student, **batch) with a "
            "kdloss.Distiller, or give the pairs of "
            "kdloss.layers.pair_by_resolution(student_sizes, teacher_sizes)"
        )
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
        "all_to_one": lambda: [teacher_depth - 1] * count,
    }
    return _equal_weights(selected, partners[pairing]())


def learned(pairing: Any) -> bool:
    """Whether a pairing is learned: called at every step with the features and their distances."""
    return callable(pairing) and takes(pairing, "distances")


def check_pairing(pairing: str) -> None:
    """Raise for an unknown name of a pairing."""
    if pairing not in PAIRINGS:
        raise ValueError(
            f"pairing={pairing!r} is unknown; choose one of {list(PAIRINGS)}, or give (student, "
            "teacher) pairs, (student, teacher, weight) or a callable"
        )


def with_weights(given: Sequence[Any]) -> list[tuple[Any, Any, float]]:
    """The given pairs, each with its weight; 1/N if they have none."""
    lengths = {len(p) if isinstance(p, (tuple, list)) else 0 for p in given}
    if lengths == {2}:
        return [(s, t, 1 / len(given)) for s, t in given]
    if lengths != {3}:
        raise TypeError(
            "pairing must be (student, teacher) pairs, like [(0, 1), (3, 7)], or all of them with a "
            f"weight, like [(0, 1, 0.3), (3, 7, 0.7)], got {given}"
        )
    weights = [w for _, _, w in given]
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in weights):
        raise TypeError(f"weights of pairs must be numbers, got {weights}")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"weights of pairs must be finite, at least 0 and not all 0, got {weights}")
    return [(s, t, float(w)) for s, t, w in given]


def check_distinct(pairs: list[tuple[Any, Any, float]], given: Sequence[Any]) -> list[tuple[Any, Any, float]]:
    """Raise for a pair given twice, and for a student layer given twice without weights; else return the pairs."""
    if len({(s, t) for s, t, _ in pairs}) < len(pairs):
        raise ValueError(f"pairing={given} names a pair twice; give it once, with the sum of the weights")
    if len(given[0]) == 2 and len({s for s, _, _ in pairs}) < len(pairs):
        meant = ", ".join(f"({s!r}, {t!r}, {w:.3g})" for s, t, w in pairs)
        raise ValueError(
            f"pairing={given} names a student layer twice; if it is to learn from several, give weights: "
            f"pairing=[{meant}]"
        )
    return pairs


def _equal_weights(students: Sequence[int], teachers: Sequence[int]) -> Pairs:
    return [(s, t, 1 / len(students)) for s, t in zip(students, teachers, strict=True)]


def _relative(i: int, student_depth: int, teacher_depth: int) -> int:
    if student_depth == 1:
        return teacher_depth - 1
    steps = student_depth - 1
    return (2 * i * (teacher_depth - 1) + steps) // (2 * steps)  # rounds halves up, in integers


def _before_next_kept(
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
