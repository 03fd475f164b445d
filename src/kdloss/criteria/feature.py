"""Distillation of hidden features."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kdloss import _checks
from kdloss._capture import Take
from kdloss.criteria._features import (
    Distance,
    Features,
    Pairs,
    Resize,
    compare,
    feature_pairs,
    label,
    one_width,
    positions_shape,
)
from kdloss.criteria._learned import learned_values
from kdloss.criteria._positions import Positions
from kdloss.criteria._terms import logit_loss, logits_of, mixed
from kdloss.criteria._trained import Projection, Side, Trained
from kdloss.distances.mse import mse
from kdloss.divergences import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.layers import Layer, LayerMap, Layers, Pairing, learned, width
from kdloss.reduction import Reduction


class FeatureKD(nn.Module):
    r"""Cross-entropy mixed with distances between hidden features of student and teacher.

    $\alpha\,\mathrm{CE} + (1-\alpha)\left(\sum_{i=1}^N w_i\,
    d(P_i h^s_i, h^t_{\pi(i)}) + \lambda\,T^2\,\mathrm{KL}\right)$ with N pairs of blocks, each of weight
    1/N unless the pairing says otherwise, d a mean squared error, P a trained projection where the
    widths differ, and $\lambda$ = `logit_weight`.

    - `layers` selects student blocks: any selection of `kdloss.layers.select`, or module names.
    - `pairing` finds their teacher blocks: any pairing of `kdloss.layers.pair`, or pairs of module names.
      Modules that are no blocks pair by `pairing="same"` (names) or explicit pairs. A callable with a
      parameter called `distances`, like `kdloss.layers.pair_by_emd`, is asked at every step: see below.
    - `blocks` names the list of blocks in models that have several; `take` says what counts of the
      modules' outputs (for all, or by name), as in `kdloss.capture`. A tuple of names is their outputs
      side by side.
    - `distance` is any function like `kdloss.distances.mse`, `divergence` like `kdloss.divergences.forward_kl`.
      A class of modules, like `kdloss.distances.VID` or a `functools.partial` of it, is built once per student layer
      with the widths that arrive there.
    - Projections are built by `prepare`, or here from `widths`, (student, teacher) for all pairs or
      one per pair, and `depths`. They are parameters: give them to the optimizer. `projection`
      (`kdloss.projections.linear`, `mlp`, `conv1x1`, any function of two widths) makes them, for equal widths
      too; without it there is a linear one where the distance wants equal widths and they differ.
      `project="teacher"` projects the teacher's features to the student's width instead, by orthonormal
      rows that are never trained; `shared=True` has one projection for all pairs.
    - `resize` (`kdloss.resize.pool`, `kdloss.resize.interpolate`) brings both sides to the same positions.

    Called with outputs that hold features: what `kdloss.capture` recorded, or Hugging Face outputs
    made with `output_hidden_states=True`. (These hold the last block after the model's final norm:
    it can be held against the teacher's last only.) Features are `[B, T, D]`, `[B, D]` or maps
    `[B, C, H, W]`. Those at the labels' positions are counted where the labels are; others are
    averaged within their example, over `feature_mask` where given. Labels, mask, `alpha`, `causal`,
    `reduction` and the rest as in `VanillaKD`. `components` then holds the detached terms "ce",
    "kd", each pair's distance "feature/3-7", and "feature", their sum by weight.

    A learned pairing is called as `pairing(student=..., teacher=..., distances=...)`: features `[..., D]`
    by block, projected, 0 where nothing counts, and the mean distance of every pair of a selected student
    and any teacher block, all detached. It returns triples (student, teacher, weight), the weight a
    number, or a tensor of one or of one for each position, which is a constant to the gradient.
    `components` then has one "feature/3" for each student block, its share of "feature".

    Raises: ValueError or TypeError for settings out of range, blocks that don't exist, widths that
    differ without a projection, and inputs that don't fit, saying what to write instead.

    >>> import torch
    >>> from types import SimpleNamespace as Output
    >>> criterion = FeatureKD(layers="last", alpha=0.0)
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
        alpha: float = 0.3,
        temperature: float = 2.0,
        logit_weight: float = 0.0,
        divergence: Divergence = forward_kl,
        blocks: str | None = None,
        take: Take | Mapping[int | str, Take] = None,
        depths: tuple[int, int] | None = None,
        widths: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        causal: bool | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        check_finite: bool = False,
        vocabulary: Vocabulary | None = None,
        overwrite_logits: bool = False,
    ) -> None:
        super().__init__()
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        _checks.function("divergence", divergence, "divergences.forward_kl")
        if vocabulary is not None:
            _checks.function("vocabulary", vocabulary, "truncate")
        _checks.function("distance", distance, "distances.mse")
        self.layer_map = LayerMap(layers, pairing, blocks, depths)
        self.take = take
        self.distance = distance
        self.alpha = _checks.fraction("alpha", alpha)
        self.temperature = _checks.temperature(temperature)
        self.logit_weight = _checks.weight("logit_weight", logit_weight)
        self.divergence = divergence
        self.causal = causal
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.check_finite = check_finite
        self.vocabulary = vocabulary
        self.overwrite_logits = overwrite_logits
        self.components: dict[str, Tensor] = {}
        if resize is not None:
            _checks.function("resize", resize, "resize.pool")
        self.resize = resize
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

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether the teacher's logits enter the loss at all."""
        return self.alpha < 1 and self.logit_weight > 0

    def prepare(self, student: nn.Module, teacher: nn.Module) -> "FeatureKD":
        """Find both models' blocks and build the projections; do it before the optimizer.

        Widths are read from Hugging Face configurations; `Distiller.prepare(student, **batch)`
        measures those of other models.
        """
        self.layer_map.locate(student, teacher)
        s_width, t_width = width(student), width(teacher)
        if s_width is not None and t_width is not None and not self.layer_map.unmeasured:
            pairs = [(s, t) for s, t, _ in self.layer_map.pairs()]
            blocks = [pair for pair in pairs if all(isinstance(name, int) for name in pair)]
            self.build(dict.fromkeys(blocks, (s_width, t_width)))
        return self.to(next(student.parameters()).device)

    def build(self, widths: Mapping[tuple[Layer, Layer], tuple[int, int]]) -> None:
        """Build the projections of student layers for pairs of these (student, teacher) widths.

        A student layer has one projection, whichever teacher layers it is held against. One that fits
        already is kept, with what it has learned.

        Raises: ValueError for a student layer whose teachers have several widths.
        """
        self._trained.build(one_width(widths))

    def forward(
        self,
        student: Any,
        teacher: Any,
        labels: Int64[Tensor, "..."] | None = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        feature_mask: Bool[Tensor, "..."] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Float[Tensor, "..."]:
        """The mixed loss; see the class. `pairs` are those of this step, where they are random."""
        features: Features = {}
        pair_weights: dict[tuple[Layer, Layer], float] = {}
        if self.alpha < 1:
            features, pair_weights = feature_pairs(student, teacher, self.layer_map, pairs, self.resize)
        needs_logits = self.alpha > 0 or self.uses_teacher_logits
        logits = logits_of(student, "student") if needs_logits else None
        where = Positions.of(
            positions_shape(logits, labels, mask, features, feature_mask),
            labels,
            mask,
            causal=bool(self.causal),
            ignore_index=self.ignore_index,
        )
        rest = 1 - self.alpha
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        if logits is not None:
            weights = self.alpha, rest * self.logit_weight
            loss, terms = logit_loss(self, logits, teacher, where, weights, num_items_in_batch)
            losses.append(loss)
        if features:
            compared = {}
            for (s, t), both in features.items():
                projections, distance = self._trained.of(s)
                name = label(s, t)
                compared[s, t] = compare(name, distance, projections, *both, where, feature_mask)
            if learned(self.layer_map.pairing):
                values = learned_values(self.layer_map.pairing, compared, where)
                weight_of = dict.fromkeys(values, 1.0)
            else:
                values = {label(s, t): c.values(where) for (s, t), c in compared.items()}
                weight_of = dict(zip(values, pair_weights.values(), strict=True))
            shares = {name: rest * w for name, w in weight_of.items()}
            loss, distances = mixed(self, values, shares, where, num_items_in_batch)
            losses.append(loss)
            total = torch.stack([w * distances[name] for name, w in weight_of.items()]).sum(0)
            terms |= {**distances, "feature": total}
        self.components = terms
        return torch.stack(losses).sum(0)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return (
            f"{self.layer_map}, alpha={self.alpha}, temperature={self.temperature}, "
            f"logit_weight={self.logit_weight}, causal={self.causal}"
        )
