"""Distances to a teacher's hidden features, as a term."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._layout import Patterns
from kdloss.distances.mse import mse
from kdloss.layers.blocks import width
from kdloss.layers.layer_map import Layer, LayerMap
from kdloss.layers.pair import Pairing, learned
from kdloss.layers.select import Layers
from kdloss.terms._axes import Axes
from kdloss.terms._compare import (
    Distance,
    Resize,
    compare,
    feature_pairs,
    label,
    one_width,
    refuse_take,
    sizes,
    width_of,
)
from kdloss.terms._learned import learned_values
from kdloss.terms._trained import Projection, Side, Trained
from kdloss.terms.reads import Pairs, Reads, Takes
from kdloss.terms.step import Step
from kdloss.terms.term import Term, Where


class Features(Term):
    r"""Distances between the hidden features of student and teacher, layer by layer.

    $\sum_{i=1}^N w_i\, d(P_i h^s_i, h^t_{\pi(i)})$ over N pairs of layers. Each weight $w_i$ is 1/N unless the pairing
    gives others, the default d is the mean squared error, and $P_i$ is a trained projection where the widths differ.

    - `layers`: which student blocks to use: any selection of `kdloss.layers.select`, or module names.
    - `pairing`: which teacher block goes with each: any pairing of `kdloss.layers.pair`, or pairs of module names.
      Modules that are not blocks need `pairing="same"` (the same names) or explicit pairs. A function with a
      parameter `distances`, such as `kdloss.layers.pair_by_emd`, is called at every step: see below.
    - `distance`: any function like `kdloss.distances.mse`. A distance with a parameter `mask` gets the positions that
      count, one with `labels` their classes, one with `index` their examples. A module class, such as
      `kdloss.distances.VID` or a `functools.partial` of it, is built once per student layer for the widths that it
      gets, after projection. A distance whose attribute `any_width` is True gets features of different widths as they
      are.
    - `projection`: a function of two widths that makes each projection (`kdloss.projections.linear`, `mlp`, `conv1x1`
      or your own), used for equal widths too. Without it a linear projection is made where the widths differ and the
      distance needs equal ones. Projections are parameters of this term.
    - `project`: "teacher" projects the teacher's features to the student's width instead, with orthonormal rows that
      are never trained. `shared`: True uses one projection for all pairs.
    - `depths`, `widths`: the numbers of blocks and the widths as (student, teacher), where no `prepare` finds them.
      Widths hold for all pairs, or are a list with one entry for each.
    - `resize`: a function that brings both features to the same positions (`kdloss.resize.pool`,
      `kdloss.resize.interpolate`). It gets tokens `[B, N, D]`, maps `[B, C, H, W]` or volumes `[B, C, D, H, W]`,
      whatever the layouts of the models.
    - `blocks`: the name of the list of blocks, in models that have several.
    - `take`, `teacher_take`: which part of a module's output is the feature (for all modules, or a dict by name), as in
      `kdloss.capture`. `teacher_take` is the same as `take` unless you pass it; None takes the output as it is. A
      tuple of names concatenates their outputs along the width; "fpn[0]" is element 0 of what `fpn` returned.
    - `layout`, `teacher_layout`: the axes of the features after `take`, where they differ from the default (for all
      modules, or a dict by name), such as "b h w c", "b c t", "t b d" or "b c d h w": b is the batch, c the width (d if
      there is no c), all other letters are positions. `teacher_layout` is the same as `layout` unless you pass it; None
      is the default. Either is checked against what modules, labels and inputs show.
    - `teacher`: the index of the teacher to read. `positions`: "labels" or "mask", as in `kdloss.terms.Term`.
      `name`: the term's entry in `components`.

    It reads what `kdloss.capture` recorded, or Hugging Face outputs made with `output_hidden_states=True`. (There the
    last entry comes after the model's final norm, so the student's last block can be paired only with the teacher's
    last.)

    Shapes: features `[B, T, D]`, `[B, D]` or maps `[B, C, H, W]`; other shapes need a layout. Features at the
    positions of the labels count where the labels count. Other features are averaged within each example, over
    `feature_mask` if it is given. Without labels, features of an encoder or of another tower are averaged over the
    examples. `components` has each pair's distance, "feature/3-7", and "feature", their weighted sum.

    A learned pairing is called as `pairing(student=..., teacher=..., distances=...)`. It gets the features `[..., D]`
    by block, projected and 0 where nothing counts, and the mean distance of every pair of a selected student block and
    any teacher block, all detached. It returns triples (student, teacher, weight). The weight is a number, or a tensor
    with one number or with one per position; no gradient goes through it. `components` then has one "feature/3" for
    each student block: its part of "feature".

    Raises: ValueError or TypeError for settings out of range, blocks that don't exist, widths that differ without a
    projection, and inputs that don't fit. The message says what to write instead.

    >>> from types import SimpleNamespace as Output
    >>> import kdloss
    >>> criterion = 2.0 * Features("last", distance=kdloss.distances.smooth_l1)
    >>> student = Output(hidden_states=[torch.zeros(1, 4, 8)] * 3)
    >>> teacher = Output(hidden_states=[torch.ones(1, 4, 8)] * 7)
    >>> criterion(student, teacher), sorted(criterion.components)
    (tensor(1.), ['feature', 'feature/1-5'])

    Romero et al. 2015, "FitNets", arXiv:1412.6550; Sun et al. 2019, "Patient Knowledge Distillation
    for BERT Model Compression", arXiv:1908.09355.
    """

    def __init__(
        self,
        layers: Layers | Sequence[str] = "auto",
        *,
        pairing: Pairing | Sequence[tuple[Layer, Layer]] | Pairs = "uniform",
        distance: Distance | type[nn.Module] = mse,
        projection: Projection | None = None,
        project: Side = "student",
        shared: bool = False,
        resize: Resize | None = None,
        blocks: str | None = None,
        take: Takes = None,
        teacher_take: Takes | EllipsisType = ...,
        layout: Patterns = None,
        teacher_layout: Patterns | EllipsisType = ...,
        depths: tuple[int, int] | None = None,
        widths: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        teacher: int = 0,
        positions: Where = "labels",
        name: str = "feature",
    ) -> None:
        super().__init__(name=name, teacher=teacher, positions=positions)
        if self.several:
            raise TypeError(
                f"Features reads one teacher, got teacher={teacher!r}; add one term for each: "
                "Features(teacher=0, name='first') + Features(teacher=1, name='second')"
            )
        _checks.function("distance", distance, "distances.mse")
        if resize is not None:
            _checks.function("resize", resize, "resize.pool")
        self.layer_map = LayerMap(layers, pairing, blocks, depths)
        self.distance, self.resize = distance, resize
        self.take: Takes = take
        self.teacher_take: Takes = take if isinstance(teacher_take, EllipsisType) else teacher_take
        taught = layout if isinstance(teacher_layout, EllipsisType) else teacher_layout
        self.axes = Axes("student", layout), Axes("teacher", taught, "teacher_layout")
        self.projections, self.distances = nn.ModuleDict(), nn.ModuleDict()
        self._trained = Trained(projection, project, shared, distance, self.projections, self.distances)
        if widths is not None:
            pairs = self.layer_map.pairs()
            per_pair: Any = [widths] * len(pairs) if isinstance(widths[0], int) else widths
            if len(per_pair) != len(pairs):
                raise ValueError(
                    f"{len(per_pair)} widths for {len(pairs)} pairs {pairs}; write widths=(student, "
                    "teacher) for all pairs, or a list of one for each"
                )
            self.build({(s, t): w for (s, t, _), w in zip(pairs, per_pair, strict=True)})

    def reads(self) -> Reads:
        """The features of this step's pairs; the teacher's pass may stop after the last of them."""
        chosen = self.layer_map
        pairs = chosen.pairs() if chosen.known and not chosen.unmeasured else None
        return Reads(
            logits="none",
            teacher_output=False,
            pairs=pairs,
            blocks=chosen.blocks,
            take=self.take,
            teacher_take=self.teacher_take,
        )

    def locate(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find the blocks of `student` and of this term's entry in `teachers`."""
        teacher = teachers[self.teacher[0]]
        if isinstance(teacher, nn.Module):
            self.layer_map.locate(student, teacher)

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find the blocks, and build the projections if the configurations of both models give the widths."""
        self.locate(student, teachers)
        teacher = teachers[self.teacher[0]]
        s, t = width(student), None if teacher is None else width(teacher)
        if s is None or t is None or self.layer_map.unmeasured:
            return
        pairs = [(a, b) for a, b, _ in self.layer_map.pairs() if isinstance(a, int) and isinstance(b, int)]
        self._trained.configure(one_width(dict.fromkeys(pairs, (s, t))))
        self.to(next(student.parameters()).device)

    def candidates(self) -> Reads:
        """The features that have to be captured before projections can be built."""
        chosen = self.layer_map
        self._candidates = chosen.candidates() if chosen.by_resolution else chosen.pairs()
        return replace(self.reads(), pairs=self._candidates, shapes=True)

    def measure(self, student: Captured, teacher: Captured) -> None:
        """Build the projections for the widths captured from `student` and `teacher`."""
        chosen = self.layer_map
        if chosen.by_resolution:
            chosen.sizes = sizes(student, self.axes[0]), sizes(teacher, self.axes[1])
        pairs = chosen.pairs() if chosen.by_resolution else self._candidates  # a new random draw would differ
        own, its = self.axes
        self.build({(s, t): (width_of(student, s, own), width_of(teacher, t, its)) for s, t, _ in pairs})

    def build(self, widths: Mapping[tuple[Layer, Layer], tuple[int, int]]) -> None:
        """Build the trained modules for pairs of these (student, teacher) `widths`.

        Modules that fit keep what they learned. For modules of other widths it raises, and never replaces them.
        """
        self._trained.build(one_width(widths))

    def loss(self, step: Step) -> Tensor:
        """The weighted distance at every position; see the class."""
        refuse_take(step.student, self.take, step.reads, "student")
        refuse_take(step.teacher, self.teacher_take, step.reads, "teacher")
        self._refuse_unknown()
        features, weights = feature_pairs(
            step.student, step.teacher, self.layer_map, step.reads.pairs, self.resize, self.axes, step.batch
        )
        compared = {}
        for (s, t), both in features.items():
            projections, distance = self._trained.of(s)
            name = f"{self.name}/{label(s, t)}"
            own = partial(step.feature_mask, s)
            compared[s, t] = compare(name, distance, projections, *both, step.where, own, step.index)
        if learned(self.layer_map.pairing):
            shares = learned_values(self.layer_map.pairing, compared, step.where)
            for name, share in shares.items():
                step.report(f"{self.name}/{name}", share)
            return torch.stack(list(shares.values())).sum(0)
        values = {pair: c.values(step.where) for pair, c in compared.items()}
        for pair, value in values.items():
            step.report(f"{self.name}/{label(*pair)}", value)
        return torch.stack([weights[pair] * value for pair, value in values.items()]).sum(0)

    def _refuse_unknown(self) -> None:
        """Raise where `take` or `layout` name layers that this term doesn't read."""
        takes = (take for take in (self.take, self.teacher_take) if isinstance(take, Mapping))
        named = dict.fromkeys(name for names in (*takes, *(one.names for one in self.axes)) for name in names)
        known = self.layer_map.names if named else []
        if unknown := [name for name in named if isinstance(name, str) and name not in known]:
            there = known or "blocks, which are named by number"
            raise ValueError(f"take or layout names {unknown}, and the layers are {there}")

    def __repr__(self) -> str:
        name = getattr(self.distance, "__name__", repr(self.distance))
        return f"Features({self.layer_map}, distance={name})"
