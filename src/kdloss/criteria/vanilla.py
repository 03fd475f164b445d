"""`VanillaKD`: cross-entropy and a divergence from the teacher's predictions."""

from types import EllipsisType

from kdloss.criteria._settings import checked_alpha, mixing, of_term, rest
from kdloss.divergences.forward_kl import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.reduction import Reduction
from kdloss.schedules import Setting
from kdloss.terms import CrossEntropy, Logits, Sum


class VanillaKD(Sum):
    r"""Cross-entropy mixed with a divergence from the teacher's softened predictions.

    $\alpha\,\mathrm{CE}(s, y) + (1-\alpha)\,T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,
    \mathrm{softmax}(s/T))$, each term averaged over the positions that count. It is the sum
    `alpha * kdloss.CrossEntropy() + (1 - alpha) * kdloss.Logits(divergence, temperature=temperature)`.

    - `temperature`: T, a number or a function of the step (`kdloss.schedules`).
    - `alpha`: the weight of cross-entropy, a number from 0 to 1 or a function of the step. 1 is plain training and
      needs no teacher; 0 is pure distillation and needs no labels. The defaults are those of the original recipe. For
      the language models that we measured (docs/results.md) T = 1 and alpha = 0.1 were better with a good teacher, and
      alpha near 1 with a weak one.
    - `divergence`, `vocabulary`: see `kdloss.Logits`.
    - `causal`, `ignore_index`, `reduction`, `check_finite`, `overwrite_logits`, `layout`, `teacher_layout`: the
      options of `kdloss.Sum`.

    Call it with the student's and the teacher's logits `[..., V]` (tensors, `LazyLogits`, a teacher's `TopKLogits` or
    `Mixture`, both `ShardedLogits`) or with outputs that have `.logits`; with labels `[...]` int64 and, if you like, a
    mask `[...]` (True = keep). Labels equal to `ignore_index` and False in the mask take a position out of every term.
    For `num_items_in_batch` see `kdloss.reduce`. It returns a scalar in float32 or better (`[...]` for "none"), in
    nats. `components` then holds the terms "ce" and "kd", detached. You can assign `alpha` and `temperature`.

    Raises: ValueError or TypeError for settings out of range, missing labels, and shapes, vocabularies, dtypes or
    devices that don't fit. The message says what to write instead.

    >>> import torch
    >>> criterion = VanillaKD(temperature=2.0, alpha=0.5)
    >>> student, teacher = torch.zeros(2, 5, requires_grad=True), torch.zeros(2, 5)
    >>> loss = criterion(student, teacher, torch.tensor([1, -100]))  # half of log 5; KL is 0
    >>> round(loss.item(), 4), sorted(criterion.components)
    (0.8047, ['ce', 'kd'])

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """

    alpha = mixing()
    temperature = of_term("kd", "temperature")

    def __init__(
        self,
        temperature: Setting = 2.0,
        alpha: Setting = 0.5,
        *,
        divergence: Divergence = forward_kl,
        vocabulary: Vocabulary | None = None,
        causal: bool | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        check_finite: bool = False,
        overwrite_logits: bool = False,
        layout: str | None = None,
        teacher_layout: str | EllipsisType | None = ...,
    ) -> None:
        alpha = checked_alpha(alpha)
        super().__init__(
            alpha * CrossEntropy(),
            rest(alpha) * Logits(divergence, temperature=temperature, vocabulary=vocabulary),
            causal=causal,
            ignore_index=ignore_index,
            reduction=reduction,
            check_finite=check_finite,
            overwrite_logits=overwrite_logits,
            layout=layout,
            teacher_layout=teacher_layout,
        )
        self._alpha, self._shares = alpha, {"kd": 1.0}
