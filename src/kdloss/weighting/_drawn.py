"""One teacher per step, drawn at random."""

import random
from collections.abc import Sequence
from functools import partial

from kdloss.schedules import Schedule
from kdloss.targets.mixture import checked_weights


def drawn(probabilities: Sequence[float], seed: int = 0) -> list[Schedule]:
    """Draw one teacher per step: gives one schedule per teacher, 1 in the steps where it is drawn, else 0.

    - `probabilities`: one for each teacher, non-negative and with sum 1.
    - `seed`: the seed of the draws. The number of the step decides each draw, so a resumed run draws the same teachers
      as an uninterrupted one.

    A teacher that isn't drawn isn't run. Raises: ValueError for probabilities that are negative or don't add up to 1.

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
