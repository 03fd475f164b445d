"""`FeatureKD`: cross-entropy and distances between hidden features."""

from collections.abc import Sequence
from types import EllipsisType

from torch import nn

from kdloss import _checks
from kdloss._layout import Patterns
from kdloss.criteria._settings import checked_alpha, mixing, of_term, projections_of, rest, share_of
from kdloss.distances.mse import mse
from kdloss.divergences.forward_kl import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.layers.layer_map import Layer
from kdloss.layers.pair import Pairing
from kdloss.layers.select import Layers
from kdloss.reduction import Reduction
from kdloss.schedules import Setting
from kdloss.terms import CrossEntropy, Features, Logits, Sum
from kdloss.terms._compare import Distance, Resize
from kdloss.terms._trained import Projection, Side
from kdloss.terms.reads import Pairs, Takes


class FeatureKD(Sum):
    r"""Cross-entropy mixed with distances between the hidden features of student and teacher.

    $\alpha\,\mathrm{CE} + (1-\alpha)\left(\sum_{i=1}^N w_i\,
    d(P_i h^s_i, h^t_{\pi(i)}) + \lambda\,T^2\,\mathrm{KL}\right)$ over N pairs of blocks. Each weight $w_i$ is 1/N
    unless the pairing gives others, the default d is the mean squared error, $P_i$ is a trained projection where the
    widths differ, and $\lambda$ is `logit_weight`. It is the sum `alpha * kdloss.CrossEntropy() + (1 - alpha) *
    (kdloss.Features(layers, ...) + logit_weight * kdloss.Logits(divergence, temperature=temperature))`.

    - `alpha`: the weight of cross-entropy, a number from 0 to 1 or a function of the step (`kdloss.schedules`).
    - `logit_weight`, `temperature`, `divergence`, `vocabulary`: the optional term on logits, see `kdloss.Logits`. It
      is off unless `logit_weight` is above 0.
    - `layers`, `pairing`, `distance`, `projection`, `project`, `shared`, `resize`, `blocks`, `take`, `teacher_take`,
      `layout`, `teacher_layout`, `depths`, `widths`: see `kdloss.Features`. The defaults are those of the original
      recipe. For the language models that we measured (docs/results.md) `layers="last"` with
      `distance=kdloss.distances.layer_norm_mse` was better.
    - `causal`, `ignore_index`, `reduction`, `check_finite`, `overwrite_logits`, `logit_layout`: the options of
      `kdloss.Sum`; `logit_layout` is its `layout`.

    Call it with outputs that hold features: what `kdloss.capture` recorded, or Hugging Face outputs made with
    `output_hidden_states=True`. Labels, mask and the rest are as in `VanillaKD`. `components` then holds, detached,
    "ce", "kd", each pair's distance, "feature/3-7", and "feature", their weighted sum. You can assign `alpha`,
    `logit_weight`, `temperature` and `projections`.

    Raises: ValueError or TypeError for settings out of range, blocks that don't exist, widths that differ without a
    projection, and inputs that don't fit. The message says what to write instead.

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

    alpha = mixing()
    logit_weight = share_of("kd", "logit_weight")
    temperature = of_term("kd", "temperature")
    projections = projections_of("feature")

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
        alpha: Setting = 0.3,
        temperature: Setting = 2.0,
        logit_weight: float = 0.0,
        divergence: Divergence = forward_kl,
        blocks: str | None = None,
        take: Takes = None,
        teacher_take: Takes | EllipsisType = ...,
        layout: Patterns = None,
        teacher_layout: Patterns | EllipsisType = ...,
        depths: tuple[int, int] | None = None,
        widths: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        causal: bool | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        check_finite: bool = False,
        vocabulary: Vocabulary | None = None,
        overwrite_logits: bool = False,
        logit_layout: str | None = None,
    ) -> None:
        logit_weight = _checks.weight("logit_weight", logit_weight)
        alpha = checked_alpha(alpha)
        features = Features(
            layers,
            pairing=pairing,
            distance=distance,
            projection=projection,
            project=project,
            shared=shared,
            resize=resize,
            blocks=blocks,
            take=take,
            teacher_take=teacher_take,
            layout=layout,
            teacher_layout=teacher_layout,
            depths=depths,
            widths=widths,
        )
        logits = Logits(divergence, temperature=temperature, vocabulary=vocabulary)
        super().__init__(
            alpha * CrossEntropy(),
            rest(alpha) * features,
            rest(alpha) * (logit_weight * logits),
            causal=causal,
            ignore_index=ignore_index,
            reduction=reduction,
            check_finite=check_finite,
            overwrite_logits=overwrite_logits,
            layout=logit_layout,
        )
        self._alpha, self._shares = alpha, {"feature": 1.0, "kd": logit_weight}
