"""Pair layers by optimal transport."""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kdloss._extras import extra

Distances = Mapping[tuple[int, int], Tensor]


def pair_by_emd(
    student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], distances: Distances
) -> list[tuple[int, int, float]]:
    r"""Weight pairs by the cheapest transport from student to teacher blocks, computed at every step.

    $w = \arg\min_{f \ge 0} \sum_{st} f_{st}\, d_{st}$ with $\sum_t f_{st} = 1/S$ for each of S student
    and $\sum_s f_{st} = 1/T$ for each of T teacher blocks. Every block takes part, and the loss
    $\sum w d$ is the earth mover's distance between the models. It is solved exactly, for any S and T.

    Use it as `FeatureKD(pairing=kdloss.layers.pair_by_emd)`. The paper divides by the total flow, which is
    1 here. After every step the paper also moves the shares 1/S and 1/T towards cheap blocks. That state
    would have to be saved and synchronised, so here the shares stay equal, as in the paper's first step.

    Shapes: `distances` holds one number for every pair of a student and a teacher block. `student` and `teacher`
    are parameters of every learned pairing; they are not used here. The solver reads the distances on the CPU, so a
    GPU has to wait at every step.

    Raises: ImportError without SciPy (`pip install 'kdloss[emd]'`); ValueError for a distance that is not finite.

    >>> distances = {(0, 0): 0.1, (0, 1): 0.2, (0, 2): 9.0, (1, 0): 5.0, (1, 1): 0.3, (1, 2): 0.4}
    >>> pairs = pair_by_emd({}, {}, {pair: torch.tensor(d) for pair, d in distances.items()})
    >>> [(s, t, round(w, 3)) for s, t, w in pairs]
    [(0, 0, 0.333), (0, 1, 0.167), (1, 1, 0.167), (1, 2, 0.333)]

    Li et al. 2020, "BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's
    Distance", arXiv:2010.06133.
    """
    students, teachers = (list(dict.fromkeys(pair[side] for pair in distances)) for side in (0, 1))
    cost = torch.stack([distances[s, t] for s in students for t in teachers]).double()
    if not cost.isfinite().all():
        wrong = {pair: d.item() for pair, d in distances.items() if not d.isfinite()}
        raise ValueError(f"no transport for distances that are not finite: {wrong}")
    # Equal shares are made of parcels of size 1 / lcm(S, T), and each parcel goes to one block.
    parcels = math.lcm(len(students), len(teachers))
    grid = cost.view(len(students), len(teachers))
    for side in (0, 1):
        grid = grid.repeat_interleave(parcels // grid.shape[side], side)
    sent = torch.zeros(len(students), len(teachers), dtype=torch.int64)
    for i, j in zip(*_scipy().linear_sum_assignment(grid.cpu().numpy()), strict=True):
        sent[i * len(students) // parcels, j * len(teachers) // parcels] += 1
    return [
        (s, t, int(sent[i, j]) / parcels) for i, s in enumerate(students) for j, t in enumerate(teachers) if sent[i, j]
    ]


def _scipy() -> Any:
    with extra("emd", "pair_by_emd"):
        return import_module("scipy.optimize")
