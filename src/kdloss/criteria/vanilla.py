"""Distillation of logits."""

from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kdloss import _checks
from kdloss.criteria._positions import Positions
from kdloss.criteria._terms import logit_loss, logits_of
from kdloss.divergences import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.reduction import Reduction


class VanillaKD(nn.Module):
    r"""Cross-entropy mixed with a divergence from the teacher's softened predictions.

    $\alpha\,\mathrm{CE}(s, y) + (1-\alpha)\,T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,
    \mathrm{softmax}(s/T))$, each term averaged over the positions that count. `alpha=1` is plain
    training and needs no teacher, `alpha=0` pure distillation and needs no labels.

    `divergence` is any function like `kdloss.divergences.forward_kl`; `functools.partial` sets its options. One that
    takes `labels` gets them, one that compares positions (`mask`) is told which count. `vocabulary`
    brings two vocabularies together: `kdloss.truncate`, a `kdloss.TokenMap`, any function of both.
    `overwrite_logits=True` lets the gradient take the place of the student's logits (a tensor, not in
    float16, reduction "mean" or "sum"), which then can't be used again.
    `causal=True` holds logits at t against label t+1 (labels as Hugging Face wants them, not
    shifted); None means False, or what `Distiller` finds the student to be. `reduction` is
    "mean", "sum" or "none". `check_finite=True` looks at the numbers, at the price of a device
    sync, and raises for NaN or +inf logits and labels out of range at positions that count.

    Called with student and teacher logits `[..., V]` (tensors, `LazyLogits`, a teacher's `TopKLogits`
    or `Mixture`, both `ShardedLogits`) or outputs that have `.logits`, labels
    `[...]` int64 and a mask `[...]` beside the labels (True = keep). Labels equal to
    `ignore_index` and False in the mask take a position out of every term; see `kdloss.reduce` for
    `num_items_in_batch`. Returns a scalar in float32 or better (`[...]` for "none"), nats;
    `components` then holds the detached terms "ce" and "kd".

    Raises: ValueError or TypeError for settings out of range, missing labels, and shapes,
    vocabularies, dtypes or devices that don't fit, saying what to write instead.

    >>> import torch
    >>> criterion = VanillaKD(temperature=2.0, alpha=0.5)
    >>> student, teacher = torch.zeros(2, 5, requires_grad=True), torch.zeros(2, 5)
    >>> loss = criterion(student, teacher, torch.tensor([1, -100]))  # half of log 5; KL is 0
    >>> round(loss.item(), 4), sorted(criterion.components)
    (0.8047, ['ce', 'kd'])

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 0.5,
        *,
        divergence: Divergence = forward_kl,
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
        self.temperature = _checks.temperature(temperature)
        self.alpha = _checks.fraction("alpha", alpha)
        self.divergence = divergence
        self.causal = causal
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.check_finite = check_finite
        self.vocabulary = vocabulary
        self.overwrite_logits = overwrite_logits
        self.components: dict[str, Tensor] = {}

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether the teacher's logits enter the loss at all."""
        return self.alpha < 1

    def forward(
        self,
        student: Any,
        teacher: Any,
        labels: Int64[Tensor, "..."] | None = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """The mixed loss; see the class."""
        logits = logits_of(student, "student")
        if labels is not None:
            _checks.labels(labels, logits)
        where = Positions.of(logits.shape[:-1], labels, mask, causal=bool(self.causal), ignore_index=self.ignore_index)
        weights = self.alpha, 1 - self.alpha
        loss, self.components = logit_loss(self, logits, teacher, where, weights, num_items_in_batch)
        return loss

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"temperature={self.temperature}, alpha={self.alpha}, causal={self.causal}"
