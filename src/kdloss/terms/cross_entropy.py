"""Cross-entropy against the labels, as a term."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss._capture import Take
from kdloss.engine import LabelTask
from kdloss.targets.kinds import AnyLogits
from kdloss.terms._outputs import logits_of
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step
from kdloss.terms.term import Term, Where

_READS = Reads(labels=True, logits="any")


class CrossEntropy(Term):
    r"""Cross-entropy of the student's predictions against the labels.

    $-\sum_c a_c \log \mathrm{softmax}(z)_c$ with $a_c = w_c\left((1-\varepsilon)\,y_c + \varepsilon / C\right)$ for
    C classes: y is 1 at the label and 0 elsewhere, or soft labels (as mixup makes them), $\varepsilon$ is
    `label_smoothing`, w are `class_weights`.

    - `label_smoothing`: the share of the label that is spread evenly over all classes, from 0 to 1.
    - `class_weights`: one factor for each class, `[C]`. The mean divides by the number of positions, not by the sum of
      their weights as `torch.nn.functional.cross_entropy` does, so that micro-batches add up.
    - `take`: which part of the student's output holds the logits: an index, a key, a path or a function. None takes
      the output itself if it is a tensor, else its `logits`.
    - `positions`: "labels" or "mask", as in `kdloss.terms.Term`. "mask" is refused for class indices.
    - `name`: the term's entry in `components`.

    Shapes: student logits `[..., C]`; labels `[...]` int64, where the sum's `ignore_index` (-100) takes a position
    out, or soft labels `[..., C]` of any floating dtype. The value is in nats.

    Raises: ValueError for a step without labels, a smoothing outside 0 to 1, shapes that don't fit, or soft labels that
    are no probabilities at a position that counts (on an accelerator under `check_finite=True`); TypeError for labels
    that are neither int64 nor floating point.

    >>> criterion = 0.5 * CrossEntropy(label_smoothing=0.1)
    >>> criterion(torch.zeros(2, 4), labels=torch.tensor([2, -100]))  # half of log 4
    tensor(0.6931)

    Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv:1512.00567 (smoothing); Zhang et al. 2018,
    "mixup", arXiv:1710.09412 (soft labels).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: Float[Tensor, " classes"] | None = None,
        take: Take = None,
        positions: Where = "labels",
        name: str = "ce",
    ) -> None:
        super().__init__(name=name, positions=positions)
        self.label_smoothing = _checks.fraction("label_smoothing", label_smoothing)
        weights = None if class_weights is None else torch.as_tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.take = take

    def reads(self) -> Reads:
        """The labels and the student's logits."""
        if self.take is not None:
            return Reads(labels=True, why=f"the term {self.name!r} takes a part of the output", logits_at=self.take)
        return _READS

    def logits(self, student: Any) -> AnyLogits:
        """The logits in the student's output."""
        found: AnyLogits = logits_of(student, "student", self.take)
        return found

    def task(self, step: Step, labels: Tensor | None) -> LabelTask:
        """The task for the engine; `labels` belong to the engine's rows and are None where labels are soft."""
        if labels is None:  # soft labels keep all positions; with `causal` each moves to the logits before it
            soft = self._soft(step)
            labels = soft.roll(-1, 1) if step.where.causal else soft
        return LabelTask(labels, self.label_smoothing, self.class_weights)

    def loss(self, step: Step) -> Tensor:
        """The value at every position; see the class."""
        where, labels = step.where, step.where.labels
        if labels is None:
            soft = self._soft(step)
            labels = where.fill(soft[:, 1:] if where.causal else soft)
        task = LabelTask(labels, self.label_smoothing, self.class_weights)
        return task.values(step.logits)

    def _soft(self, step: Step) -> Tensor:
        labels = step.labels
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"the term {self.name!r} needs labels that are a tensor of class indices or of probabilities, and "
                f"these labels are {_kind(labels)}: if the student's own loss takes them, as a detector's does, write "
                "kdloss.Task() in place of this term, beside a recipe with alpha=0"
            )
        if not labels.is_floating_point():
            raise ValueError(
                f"the term {self.name!r} counts unlabelled positions (positions='mask'), where there is no class to "
                "learn; write positions='labels', or give soft labels"
            )
        return labels

    def __repr__(self) -> str:
        smoothing = f"label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        weights = "class_weights=[...]" if self.class_weights is not None else ""
        return f"CrossEntropy({', '.join(filter(None, (smoothing, weights)))})"


def _kind(labels: Any) -> str:
    """The type of the labels, in words."""
    kind = f"a {type(labels).__name__}"
    return f"{kind} of {type(labels[0]).__name__}s" if isinstance(labels, (list, tuple)) and labels else kind
