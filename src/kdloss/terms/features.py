"""What the student learns from a teacher's hidden features."""

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
    r"""Distances between hidden features of student and teacher, layer by layer.

    $\sum_{i=1}^N w_i\, d(P_i h^s_i, h^t_{\pi(i)})$ with N pairs of layers, each of weight 1/N unless the pairing
    says otherwise, d a mean squared error, and P a trained projection where the widths differ.

    - `layers` selects student blocks: any selection of `kdloss.layers.select`, or module names.
    - `pairing` finds their teacher blocks: any pairing of `kdloss.layers.pair`, or pairs of module names.
      Modules that are no blocks pair by `pairing="same"` (names) or explicit pairs. A callable with a
      parameter called `distances`, like `kdloss.layers.pair_by_emd`, is asked at every step: see below.
    - `distance` is any function like `kdloss.distances.mse`; one that takes `mask` is told which positions count, one
      that takes `labels` their classes, one that takes `index` their examples. A class of modules, like
      `kdloss.distances.VID` or a `functools.partial` of it, is built once per student layer with the widths that
      arrive there. One whose attribute `any_width` is True takes features of different widths as they are.
    - `projection` (`kdloss.projections.linear`, `mlp`, `conv1x1`, any function of two widths) makes the
      projections, for equal widths too; without it there is a linear one where the distance wants equal
      widths and they differ. They are parameters. `project="teacher"` projects the teacher's features to the
      student's width instead, by orthonormal rows that are never trained; `shared=True` has one for all pairs.
    - `depths`, `widths`: the numbers of blocks and the widths of student and teacher, (student, teacher), where
      no `prepare` finds them; widths for all pairs, or one for each.
    - `resize` (`kdloss.resize.pool`, `kdloss.resize.interpolate`) brings both sides to the same positions. It gets
      tokens `[B, N, D]`, maps `[B, C, H, W]` and volumes `[B, C, D, H, W]`, whatever the models' layouts.
    - `blocks` names the list of blocks in models that have several. `take` and `teacher_take` say what counts of
      the modules' outputs (for all, or by name), as in `kdloss.capture`; the teacher's is the student's unless it
      is given, None takes nothing. A tuple of names is their outputs side by side; "fpn[0]" is a part of what `fpn`
      returned.
    - `layout` and `teacher_layout` name the axes where they are not the default (for all, or by name), after `take`: b
      is the batch, c the width (else d), all others are positions, as in "b h w c", "b c t", "t b d", "b c d h w". The
      teacher's is the student's unless it is given; None is the default. What modules, labels and inputs tell of the
      axes is held against either.
    - `teacher`: the index of the one it reads; `positions`: "labels" or "mask"; `name`: the entry among the
      components.

    Reads what `kdloss.capture` recorded, or Hugging Face outputs made with `output_hidden_states=True`. (These hold
    the last block after the model's final norm: it can be held against the teacher's last only.)

    Shapes: features `[B, T, D]`, `[B, D]` or maps `[B, C, H, W]`, or any with a layout. Those at the labels' positions
    are counted where the labels are; others are averaged within their example, over `feature_mask` where given; without
    labels those of another tower or an encoder are the mean of the examples. `components` has each pair's distance
    "feature/3-7" and "feature", their sum by weight.

    A learned pairing is called as `pairing(student=..., teacher=..., distances=...)`: features `[..., D]`
    by block, projected, 0 where nothing counts, and the mean distance of every pair of a selected student
    and any teacher block, all detached. It returns triples (student, teacher, weight), the weight a
    number, or a tensor of one or of one for each position, which is a constant to the gradient.
    `components` then has one "feature/3" for each student block, its share of "feature".

    Raises: ValueError or TypeError for settings out of range, blocks that don't exist, widths that
    differ without a projection, and inputs that don't fit, saying what to write instead.

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
                f"Features compares with one teacher, got teacher={teacher!r}; add one term for each: "
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
        """The features of this step's pairs; the teacher need not run further."""
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
        """Find the blocks of both models."""
        teacher = teachers[self.teacher[0]]
        if isinstance(teacher, nn.Module):
            self.layer_map.locate(student, teacher)

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find the blocks, and build the projections of models whose configurations tell their widths."""
        self.locate(student, teachers)
        teacher = teachers[self.teacher[0]]
        s, t = width(student), None if teacher is None else width(teacher)
        if s is None or t is None or self.layer_map.unmeasured:
            return
        pairs = [(a, b) for a, b, _ in self.layer_map.pairs() if isinstance(a, int) and isinstance(b, int)]
        self._trained.configure(one_width(dict.fromkeys(pairs, (s, t))))
        self.to(next(student.parameters()).device)

    def candidates(self) -> Reads:
        """What has to be seen of both models before projections can be built."""
        chosen = self.layer_map
        self._candidates = chosen.candidates() if chosen.by_resolution else chosen.pairs()
        return replace(self.reads(), pairs=self._candidates, shapes=True)

    def measure(self, student: Captured, teacher: Captured) -> None:
        """Build the projections for what `candidates` were seen to give."""
        chosen = self.layer_map
        if chosen.by_resolution:
            chosen.sizes = sizes(student, self.axes[0]), sizes(teacher, self.axes[1])
        pairs = chosen.pairs() if chosen.by_resolution else self._candidates  # drawn anew, others would be asked for
        own, its = self.axes
        self.build({(s, t): (width_of(student, s, own), width_of(teacher, t, its)) for s, t, _ in pairs})

    def build(self, widths: Mapping[tuple[Layer, Layer], tuple[int, int]]) -> None:
        """Build what is trained for pairs of these (student, teacher) widths.

        What fits stays as it learned; what was built for others is never replaced, but refused.
        """
        self._trained.build(one_width(widths))

    def loss(self, step: Step) -> Tensor:
        """The value at every position; see the class."""
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
        """Raise for options of layers that there are none of."""
        takes = (take for take in (self.take, self.teacher_take) if isinstance(take, Mapping))
        named = dict.fromkeys(name for names in (*takes, *(one.names for one in self.axes)) for name in names)
        known = self.layer_map.names if named else []
        if unknown := [name for name in named if isinstance(name, str) and name not in known]:
            there = known or "blocks, which are named by number"
            raise ValueError(f"take or layout has {unknown}, and the layers are {there}")

    def __repr__(self) -> str:
        name = getattr(self.distance, "__name__", repr(self.distance))
        return f"Features({self.layer_map}, distance={name})"
