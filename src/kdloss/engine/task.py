"""What is computed at every position: cross-entropy, a divergence, or both."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._cross_entropy import cross_entropy
from kdloss.engine.closed_forms import ClosedForm
from kdloss.reduction import precise, takes
from kdloss.targets import Logits, Mixture, TopKLogits, against, at, check, dense

Vocabulary = Callable[[Logits, Logits], tuple[Logits, Logits]]


@dataclass(frozen=True)
class Task:
    """The terms of a loss on logits, and by `terms` their specification."""

    divergence: Callable[..., Tensor] | None
    temperature: float = 1.0
    cross_entropy: bool = False
    vocabulary: Vocabulary | None = None

    def terms(
        self, student: Logits, teacher: Logits | None, labels: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cross-entropy and divergence at every position, by autograd."""
        ce = kd = None
        student = precise(dense(student))  # once, so that the terms' gradients meet before they are rounded
        if self.cross_entropy:
            assert labels is not None
            ce = cross_entropy(student, labels)
        if self.divergence is not None and teacher is not None:
            both = (student, teacher) if self.vocabulary is None else self.vocabulary(student, teacher)
            s, t = both
            if not (isinstance(s, Tensor) and isinstance(t, Tensor) and self._any_vocabulary):
                s, t = against(s, t, self.temperature)
            kd = self.diverge(s, t, labels, mask)
        return ce, kd

    def diverge(self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The divergence of logits over the same classes, with what else it wants to know."""
        assert self.divergence is not None
        if labels is None and takes(self.divergence, "labels"):
            name = getattr(unwrapped(self.divergence)[0], "__name__", repr(self.divergence))
            raise ValueError(f"{name} compares by the labels, and there are none: pass labels=...")
        extra = {"labels": labels, "mask": mask}
        extra = {name: x for name, x in extra.items() if x is not None and takes(self.divergence, name)}
        values = self.divergence(student, teacher, temperature=self.temperature, **extra)
        if values.shape != student.shape[:-1]:
            raise ValueError(
                f"a divergence returns one value per position, {tuple(student.shape[:-1])} for logits "
                f"{tuple(student.shape)}; it returned {tuple(values.shape)}: sum over the last one only"
            )
        return values

    def check(self, student: Logits, teacher: Logits) -> None:
        """Student and teacher fit each other, and the divergence what the teacher gave."""
        function = unwrapped(self.divergence)[0]
        if self._any_vocabulary and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            _checks.logit_shapes(student.shape, teacher.shape, None)
            return
        if self.vocabulary is None:
            check(student, teacher)
        else:
            _checks.logit_shapes(student.shape, teacher.shape, None)
            check(*self.vocabulary(_no_rows(student), _no_rows(teacher)))  # shapes alone: nothing is copied
        name = getattr(function, "__name__", repr(function))
        if getattr(function, "needs_logits", False) and isinstance(teacher, Mixture) and teacher.of_probabilities:
            raise ValueError(f"{name} compares logits, an average of probabilities has none; write average='logits'")
        if isinstance(teacher, TopKLogits) and teacher.tail != "uniform":
            if getattr(function, "needs_logits", False):
                raise ValueError(f"{name} compares logits, top-k logits hold probabilities; take forward_kl")
            if self.divergence is not None and takes(self.divergence, "labels"):
                raise ValueError(
                    f"{name} looks labels up among all classes, of which top-k logits hold a few; write "
                    "TopKLogits(..., tail='uniform')"
                )

    @property
    def _any_vocabulary(self) -> bool:
        """Whether the divergence takes two tensors of different classes."""
        return bool(getattr(unwrapped(self.divergence)[0], "any_vocabulary", False))

    @cached_property
    def closed_form(self) -> tuple[ClosedForm, float] | None:
        """The divergence's closed form, if it has one, and the factor T² of its value."""
        function, options = unwrapped(self.divergence)
        form = getattr(function, "closed_form", None)
        if form is None or self.vocabulary is not None or function is None:
            return None
        parameters = inspect.signature(function).parameters
        squared = "t_squared" in parameters and options.pop("t_squared", parameters["t_squared"].default)
        options.pop("temperature", None)  # the task's own holds
        return partial(form, **options), self.temperature**2 if squared else 1.0


def _no_rows(x: Logits) -> Logits:
    return at(x, lambda t: t[:0]) if len(x.shape) > 1 else x


def unwrapped(function: Any) -> tuple[Any, dict[str, Any]]:
    """A function behind `functools.partial`, and the options set on the way."""
    options: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args:
        options = {**function.keywords, **options}
        function = function.func
    return function, options


def scratch_rows(device: torch.device, classes: int) -> int:
    """How many rows are worked on at a time: what stays in a CPU's cache, or fills an accelerator."""
    entries = torch.get_num_threads() * 2**19 if device.type == "cpu" else 2**25
    return max(1, entries // max(classes, 1))


def block_rows(classes: int, budget: int = 2**27) -> int:
    """How many rows of logits are made at a time: student's and teacher's within the budget, in bytes."""
    return min(max(budget // (8 * max(classes, 1)) // 128 * 128, 128), 1024)
