"""`MultiTeacherKD`: cross-entropy and the average of several teachers."""

from collections.abc import Sequence
from types import EllipsisType
from typing import Literal

from kdloss.criteria._settings import checked_alpha, mixing, of_term, rest
from kdloss.divergences.forward_kl import forward_kl
from kdloss.engine import Divergence, Vocabulary
from kdloss.reduction import Reduction
from kdloss.schedules import Setting
from kdloss.terms import CrossEntropy, Logits, Sum


class MultiTeacherKD(Sum):
    r"""`VanillaKD` against the weighted average of several teachers.

    $\alpha\,\mathrm{CE} + (1-\alpha)\,T^2\,\mathrm{KL}(\sum_k w_k\,\mathrm{softmax}(t_k/T)\,\|\,
    \mathrm{softmax}(s/T))$; `average="logits"` averages the logits $t_k$ instead. For forward KL the gradient is the
    same as that of the weighted sum of one loss per teacher. One teacher gives exactly `VanillaKD`. It is the sum
    `alpha * kdloss.CrossEntropy() + (1 - alpha) * kdloss.Logits(divergence, teacher="all", weights=weights, ...)`.

    Call it like `VanillaKD`, with a list of teacher outputs. All teachers have the same vocabulary.

    - `weights`: one weight per teacher, non-negative and with sum 1; None weighs them equally.
    - `average`: what is averaged, the teachers' "probabilities" or their "logits".
    - `temperature`, `alpha`, `divergence`, `vocabulary`: as in `VanillaKD`.
    - `causal`, `ignore_index`, `reduction`, `check_finite`, `overwrite_logits`, `layout`, `teacher_layout`: the
      options of `kdloss.Sum`.

    Raises: what `VanillaKD` and `kdloss.Mixture` raise.

    >>> import torch
    >>> criterion = MultiTeacherKD(weights=[0.5, 0.5], alpha=0.0, temperature=1.0)
    >>> left, right = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    >>> criterion(torch.zeros(1, 2), [left, right])  # their average is uniform, as the student is
    tensor(0.)

    You, Xu, Xu, Tao 2017, "Learning from Multiple Teacher Networks", KDD.
    """

    alpha = mixing()
    temperature = of_term("kd", "temperature")

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        temperature: Setting = 2.0,
        alpha: Setting = 0.5,
        *,
        average: Literal["probabilities", "logits"] = "probabilities",
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
        average_of_all = Logits(
            divergence,
            temperature=temperature,
            teacher="all",
            weights=weights,
            average=average,
            vocabulary=vocabulary,
        )
        super().__init__(
            alpha * CrossEntropy(),
            rest(alpha) * average_of_all,
            causal=causal,
            ignore_index=ignore_index,
            reduction=reduction,
            check_finite=check_finite,
            overwrite_logits=overwrite_logits,
            layout=layout,
            teacher_layout=teacher_layout,
        )
        self._alpha, self._shares = alpha, {"kd": 1.0}
