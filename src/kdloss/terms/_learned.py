"""Learned pairings: functions that get the features and their distances at every step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdloss.layers.layer_map import Layer
from kdloss.reduction import reduce
from kdloss.terms._compare import Compared
from kdloss.terms._positions import Positions


def learned_values(
    pairing: Callable[..., Any], compared: Mapping[tuple[Layer, Layer], Compared], where: Positions
) -> dict[str, Tensor]:
    """The weighted sum of each student block's distances, one value per position, by the block's name."""
    with torch.no_grad():
        answer = pairing(
            student={s: c.student.detach() for (s, _), c in compared.items()},
            teacher={t: c.teacher for (_, t), c in compared.items()},
            distances={pair: reduce(c.each.detach(), c.keep) for pair, c in compared.items()},
        )
    chosen = list(answer)
    _check(chosen, compared)
    values: dict[str, Tensor] = {}
    for s, t, weight in chosen:
        constant = weight.detach() if isinstance(weight, Tensor) else weight
        value = compared[s, t].values(where, constant)
        name = str(s)
        values[name] = values[name] + value if name in values else value
    return values


def _check(chosen: list[Any], compared: Mapping[tuple[Layer, Layer], Compared]) -> None:
    if not chosen or not all(isinstance(p, (tuple, list)) and len(p) == 3 for p in chosen):
        raise TypeError(f"a learned pairing must return (student, teacher, weight) triples, got {chosen}")
    pairs = [(s, t) for s, t, _ in chosen]
    if unknown := [pair for pair in pairs if pair not in compared]:
        raise ValueError(
            f"a learned pairing chose {unknown}, which are not among the pairs it was given: {list(compared)}"
        )
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"a learned pairing chose a pair twice: {pairs}")
    for s, t, weight in chosen:
        fits = {(), tuple(compared[s, t].each.shape)}
        if isinstance(weight, Tensor) and tuple(weight.shape) not in fits:
            raise ValueError(
                f"the weight of pair {(s, t)} has shape {tuple(weight.shape)}; it must be a number, or one "
                f"for each position {tuple(compared[s, t].each.shape)}"
            )
