"""Distillation of hidden features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kdloss import _checks
from kdloss.criteria._features import Features, feature_pairs, pair_values, positions_shape
from kdloss.criteria._positions import Positions
from kdloss.criteria._terms import logit_loss, logits_of, mixed
from kdloss.distances.mse import mse
from kdloss.divergences import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.layers import LayerMap, Layers, Name, Pairing, width
from kdloss.projection import fits, projection
from kdloss.reduction import Reduction

Distance = Callable[[Tensor, Tensor], Tensor]


class FeatureKD(nn.Module):
    r"""Cross-entropy mixed with distances between hidden features of student and teacher.

    $\alpha\,\mathrm{CE} + (1-\alpha)\left(\frac{1}{N}\sum_{i=1}^N
    d(P_i h^s_i, h^t_{\pi(i)}) + \lambda\,T^2\,\mathrm{KL}\right)$ with N pairs of blocks, d a mean
    squared error, P a trained projection where the widths differ, and $\lambda$ = `logit_weight`.

    - `layers` selects student blocks: any selection of `kdloss.select`, or module names.
    - `pairing` finds their teacher blocks: any pairing of `kdloss.pair`, or pairs of module names.
      Modules that are no blocks pair by `pairing="same"` (names) or explicit pairs.
    - `blocks` names the list of blocks in models that have several.
    - `distance` is any function like `kdloss.mse`, `divergence` like `kdloss.forward_kl`.
    - Projections are built by `prepare`, or here from `widths`, (student, teacher) for all pairs or
      one per pair, and `depths`. They are parameters: give them to the optimizer.

    Called with outputs that hold features: what `kdloss.capture` recorded, or Hugging Face outputs
    made with `output_hidden_states=True`. (These hold the last block after the model's final norm:
    it can be held against the teacher's last only.) Features are `[B, T, D]`, `[B, D]` or maps
    `[B, C, H, W]`. Those at the labels' positions are counted where the labels are; others are
    averaged within their example, over `feature_mask` where given. Labels, mask, `alpha`, `causal`,
    `reduction` and the rest as in `VanillaKD`. `components` then holds the detached terms "ce",
    "kd", "feature" and each pair's "feature/3-7".

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
        pairing: Pairing | Sequence[tuple[Name, Name]] = "uniform",
        distance: Distance = mse,
        alpha: float = 0.3,
        temperature: float = 2.0,
        logit_weight: float = 0.0,
        divergence: Divergence = forward_kl,
        blocks: str | None = None,
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
        _checks.function("divergence", divergence, "forward_kl")
        if vocabulary is not None:
            _checks.function("vocabulary", vocabulary, "truncate")
        _checks.function("distance", distance, "mse")
        self.layer_map = LayerMap(layers, pairing, blocks, depths)
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
        self.projections = nn.ModuleDict()
        if widths is not None:
            pairs = self.layer_map.pairs()
            per_pair: Any = [widths] * len(pairs) if isinstance(widths[0], int) else widths
            if len(per_pair) != len(pairs):
                raise ValueError(
                    f"{len(per_pair)} widths for {len(pairs)} pairs {pairs}; write widths=(student, "
                    "teacher) for all pairs, or a list of one for each"
                )
            self.build({s: w for (s, _), w in zip(pairs, per_pair, strict=True)})

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
        if s_width is not None and t_width is not None:
            self.build({s: (s_width, t_width) for s, _ in self.layer_map.pairs()})
        return self.to(next(student.parameters()).device)

    def build(self, widths: Mapping[Name, tuple[int, int]]) -> None:
        """Build the projections of student layers with these (student, teacher) widths.

        One that fits already is kept, with what it has learned.
        """
        for name, (student, teacher) in widths.items():
            if not fits(self._projection(name), student, teacher):
                self.projections[_key(name)] = projection(student, teacher)

    def forward(
        self,
        student: Any,
        teacher: Any,
        labels: Int64[Tensor, "..."] | None = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        feature_mask: Bool[Tensor, "..."] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        pairs: Sequence[tuple[Name, Name]] | None = None,
    ) -> Float[Tensor, "..."]:
        """The mixed loss; see the class. `pairs` are those of this step, where they are random."""
        features: Features = {}
        if self.alpha < 1:
            features = feature_pairs(student, teacher, self.layer_map, pairs)
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
            values = {
                f"feature/{s}-{t}": pair_values(
                    f"feature/{s}-{t}", self.distance, self._projection(s), *both, where, feature_mask
                )
                for (s, t), both in features.items()
            }
            shares = dict.fromkeys(values, rest / len(values))
            loss, distances = mixed(self, values, shares, where, num_items_in_batch)
            losses.append(loss)
            terms |= {**distances, "feature": torch.stack(list(distances.values())).mean(0)}
        self.components = terms
        return torch.stack(losses).sum(0)

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        chosen = self.layer_map
        return (
            f"layers={chosen.layers!r}, pairing={chosen.pairing!r}, depths={chosen.depths}, "
            f"alpha={self.alpha}, temperature={self.temperature}, logit_weight={self.logit_weight}, "
            f"causal={self.causal}"
        )

    def _projection(self, name: Name) -> nn.Module:
        key = _key(name)
        return self.projections[key] if key in self.projections else nn.Identity()


def _key(name: Name) -> str:
    return str(name).replace(".", "/")  # a parameter's name can't hold dots
