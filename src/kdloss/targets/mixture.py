"""The average of several teachers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Size, Tensor

from kdloss import _checks
from kdloss.reduction import precise
from kdloss.targets.lazy import LazyLogits


@dataclass(frozen=True, eq=False)
class Mixture:
    r"""The weighted average of several teachers over one vocabulary.

    With `average="probabilities"` it is $z$ with $\mathrm{softmax}(z/T) = \sum_k w_k\,\mathrm{softmax}(t_k/T)$ at the
    temperature T of the loss; with "logits" it is $z = \sum_k w_k t_k$. Weights are equal by default. The logits of a
    single teacher are not changed.

    Shapes: each teacher `[..., V]`, a tensor or `LazyLogits`.

    Raises: ValueError for no teacher, shapes or devices that differ, or weights that are not one
    per teacher, non-negative and of sum 1; TypeError for integer logits.

    >>> half = Mixture([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])])
    >>> half.dense().softmax(-1)
    tensor([0.5000, 0.5000])

    You, Xu, Xu, Tao 2017, "Learning from Multiple Teacher Networks", KDD.
    """

    teachers: Sequence[Tensor | LazyLogits]
    weights: Sequence[float] | None = None
    average: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        checked_weights(self.weights, len(self.teachers))
        _checks.choice("average", self.average, ("probabilities", "logits"))
        for k, teacher in enumerate(self.teachers):
            if not isinstance(teacher, LazyLogits):
                _checks.floating(f"teacher {k}", teacher)
            if teacher.shape != self.shape or teacher.device != self.device:
                raise ValueError(
                    f"teacher {k} has logits {tuple(teacher.shape)} on {teacher.device} and teacher 0 "
                    f"{tuple(self.shape)} on {self.device}; teachers are averaged at the same positions, over one "
                    "vocabulary and on one device. For other vocabularies write a term for each teacher, with its own "
                    "way to the student's: 0.5 * kdloss.Logits(teacher=0, vocabulary=kdloss.truncate) + 0.5 * "
                    "kdloss.Logits(teacher=1, name='second', vocabulary=kdloss.truncate), or with a kdloss.TokenMap "
                    "each"
                )

    @property
    def shape(self) -> Size:
        """The shape of the logits."""
        return self.teachers[0].shape

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.teachers[0].device

    @property
    def of_probabilities(self) -> bool:
        """Whether this averages probabilities, so that its logits are known only up to a constant."""
        return self.average == "probabilities" and len(self.teachers) > 1

    def at(self, pick: Callable[[Tensor], Tensor]) -> "Mixture":
        """The same mixture at chosen positions."""
        return self._each(lambda x: x.at(pick) if isinstance(x, LazyLogits) else pick(x))

    def classes(self, ids: "Tensor | slice") -> "Mixture":
        """The mixture over some entries of the vocabulary."""
        return self._each(lambda x: x.classes(ids) if isinstance(x, LazyLogits) else x[..., ids])

    def detach(self) -> "Mixture":
        """The same mixture, detached."""
        return self._each(lambda x: x.detach())

    def dense(self, temperature: float = 1.0) -> Float[Tensor, "*batch vocab"]:
        """The logits of the average at this temperature, in float32 or better."""
        if len(self.teachers) == 1:
            return _dense(self.teachers[0])
        return self.of_rows(((weight, _dense(teacher)) for weight, teacher in self.weighted()), temperature)

    def weighted(self) -> list[tuple[float, Tensor | LazyLogits]]:
        """The teachers of a weight above 0, with their weights."""
        pairs = zip(checked_weights(self.weights, len(self.teachers)), self.teachers, strict=True)
        return [(weight, teacher) for weight, teacher in pairs if weight > 0]

    def of_rows(self, weighted: Iterable[tuple[float, Tensor]], temperature: float) -> Tensor:
        """The logits of the average of weighted logits, which are read one by one."""
        total = None
        for weight, z in weighted:
            total = self.added(total, weight, z, temperature)
        assert total is not None
        return total * temperature if self.average == "probabilities" else total

    def added(
        self, total: Tensor | None, weight: float, logits: Tensor, temperature: float, out: Tensor | None = None
    ) -> Tensor:
        """Add one more teacher to a running sum of logits, or of probabilities in log space at a temperature."""
        z = precise(logits)
        if self.average == "logits":
            return torch.mul(z, weight, out=out) if total is None else torch.add(total, z, alpha=weight, out=out)
        with torch.no_grad():  # subtracted before the division, which then rounds small numbers, not large ones
            top = z.amax(-1, keepdim=True)
        log_p = (z - top).div_(temperature).log_softmax(-1)
        if total is None:
            return torch.add(log_p, math.log(weight), out=out)
        log_p = log_p + math.log(weight)
        if torch.is_grad_enabled() and (total.requires_grad or log_p.requires_grad):
            neither = total.isneginf() & log_p.isneginf()  # there the gradient of logsumexp is NaN
            both = torch.stack([total, log_p]).masked_fill(neither, 0)
            return both.logsumexp(0).masked_fill(neither, -torch.inf)
        return torch.logaddexp(total, log_p, out=out)

    def _each(self, change: Callable[[Tensor | LazyLogits], Tensor | LazyLogits]) -> "Mixture":
        return replace(self, teachers=[change(x) for x in self.teachers])


def _dense(x: Tensor | LazyLogits) -> Tensor:
    return x.dense() if isinstance(x, LazyLogits) else x


def weights_listed(weights: Sequence[float]) -> Sequence[float]:
    """Check that weights are a list or a tensor of one dimension, not a number or a dict."""
    if isinstance(weights, str) or not isinstance(weights, (Sequence, Tensor)) or getattr(weights, "ndim", 1) != 1:
        raise TypeError(
            f"weights is a list with one number per teacher, got {weights!r}; write weights=[0.5, 0.5], and in a "
            "recipe alpha=0.5 for the weight of cross-entropy"
        )
    return weights


def checked_weights(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """One non-negative weight per teacher, of sum 1."""
    if teachers == 0:
        raise ValueError("no teacher was given; pass a list of at least one teacher's output")
    if weights is None:
        return [1 / teachers] * teachers
    if len(weights_listed(weights)) != teachers:
        raise ValueError(f"{len(weights)} weights for {teachers} teachers: {list(weights)}")
    if any(not w >= 0 for w in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"weights must be non-negative and sum to 1, got {list(weights)} (sum {sum(weights)})")
    return [float(w) for w in weights]
