"""One teacher in every step, by chance."""

import random
from collections.abc import Sequence
from functools import partial

from kdloss.schedules import Schedule
from kdloss.targets.mixture import checked_weights


def drawn(probabilities: Sequence[float], seed: int = 0) -> list[Schedule]:
    """One function of the step for each teacher: 1 in the steps in which it is drawn, else 0; one is in every step.

    - `probabilities`: of each teacher, non-negative and of sum 1. `seed`: of the draw, which a step's number decides,
      so that a resumed run draws as an undisturbed one.

    A teacher that wasn't drawn isn't run. Raises: ValueError for probabilities that are none.

    >>> import kdloss
    >>> first, second = kdloss.weighting.drawn([0.7, 0.3])
    >>> [first(step) + second(step) for step in range(3)]
    [1.0, 1.0, 1.0]
    >>> criterion = first * kdloss.Logits() + second * kdloss.Logits(teacher=1, name="second")

    Fukuda et al. 2017, "Efficient Knowledge Distillation from an Ensemble of Teachers", Interspeech.
    """
    given = checked_weights(probabilities, len(probabilities))
    return [partial(_drawn, tuple(given), seed, k) for k in range(len(given))]


def _drawn(probabilities: Sequence[float], seed: int, teacher: int, step: int) -> float:
    chosen = random.Random(f"{seed} {step}").choices(range(len(probabilities)), probabilities)
    return float(chosen == [teacher])
