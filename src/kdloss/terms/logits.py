"""What the student learns from a teacher's predictions."""

from collections.abc import Sequence
from dataclasses import replace
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdloss import _checks, schedules
from kdloss._capture import Captured, Take
from kdloss._classes import predicts_tokens
from kdloss.divergences.forward_kl import forward_kl
from kdloss.engine import Divergence, TeacherTask, Vocabulary
from kdloss.engine.task import unwrapped
from kdloss.reduction import parameters, passes_on, takes
from kdloss.schedules import Setting
from kdloss.targets import Mixture
from kdloss.targets.kinds import AnyLogits
from kdloss.terms._outputs import logits_of
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step
from kdloss.terms.term import Teachers, Term, Where
from kdloss.weighting import Weighting

READS = Reads(logits="any")


class Logits(Term):
    r"""A divergence between the predictions of student and teacher.

    $d(s, t; T)$, for the default $T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T))$.

    - `divergence`: any function like `kdloss.divergences.forward_kl`; `functools.partial` sets its options. One that
      takes `labels` gets them, one that compares positions (`mask`) is told which count.
      `kdloss.divergences.hard_labels` learns the teacher's most probable class.
    - `temperature`: what both sides' logits are divided by; a number, or a function of the step.
    - `teacher`: an index, several, whose average is the teacher, or "all". `weights` are theirs, non-negative and of
      sum 1, None for equal ones; `average` takes that of their "probabilities" or of their "logits".
    - `vocabulary` brings two vocabularies, or sets of classes, together: `kdloss.truncate`, a `kdloss.TokenMap`, any
      function of both. Without one, classes that both models name (`config.id2label`, upper and lower case alike) are
      paired by name where `kdloss.Distiller` runs the models, in whatever order; other names are refused.
    - `take`, `teacher_take`: which part of the student's and the teacher's output holds the logits: an index, a key,
      a path or a function. The teacher's is the student's unless it is given; None takes nothing.
    - `positions`: "labels" or "mask", which counts unlabelled positions, too.
    - `name`: the entry among the components.

    Shapes: logits `[..., V]` of any kind (tensors, `LazyLogits`, a teacher's `TopKLogits` or `Mixture`).

    Raises: ValueError or TypeError for settings out of range and for logits that don't fit, saying what to write.

    >>> import torch, kdloss
    >>> criterion = 0.9 * Logits(kdloss.divergences.reverse_kl, temperature=4.0) + 0.1 * kdloss.CrossEntropy()
    >>> student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    >>> criterion(student, teacher, torch.tensor([1, -100]))  # a tenth of log 5
    tensor(0.1609)

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """

    def __init__(
        self,
        divergence: Divergence = forward_kl,
        *,
        temperature: Setting = 1.0,
        teacher: Teachers = 0,
        weights: Sequence[float] | None = None,
        average: Literal["probabilities", "logits"] = "probabilities",
        vocabulary: Vocabulary | None = None,
        take: Take = None,
        teacher_take: Take | EllipsisType = ...,
        positions: Where = "labels",
        name: str = "kd",
    ) -> None:
        super().__init__(name=name, teacher=teacher, positions=positions)
        _checks.function("divergence", divergence, "divergences.forward_kl")
        if not torch.compiler.is_compiling():
            _refuse_without_temperature(divergence)
        if vocabulary is not None:
            _checks.function("vocabulary", vocabulary, "truncate")
        if isinstance(weights, Weighting):
            raise TypeError(
                f"weights are one number per teacher, got {weights!r}, which weighs terms: write {weights!r} * "
                "(kdloss.Logits(teacher=0) + kdloss.Logits(teacher=1, name='second'))"
            )
        _checks.choice("average", average, ("probabilities", "logits"))
        self.divergence = divergence
        self.temperature = temperature
        self.weights, self.vocabulary = weights, vocabulary
        self._of_tokens = True
        self.average: Literal["probabilities", "logits"] = average
        self.take: Take = take
        self.teacher_take: Take = take if isinstance(teacher_take, EllipsisType) else teacher_take

    @property
    def temperature(self) -> Setting:
        """A number, or a function of the step."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: Setting) -> None:
        self._temperature = value if callable(value) else _checks.temperature(value)

    @property
    def scheduled(self) -> bool:
        """Whether the temperature depends on the step."""
        return callable(self._temperature)

    def locate(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find out whether the student's classes are tokens, whose ids a `TokenMap` translates for the teacher."""
        self._of_tokens = predicts_tokens(student)

    @property
    def _any_vocabulary(self) -> bool:
        return getattr(unwrapped(self.divergence)[0], "any_vocabulary", False)

    def reads(self) -> Reads:
        """Both sides' logits; as a tensor where rows of them can't be told apart."""
        rename = getattr(self.vocabulary, "to_teacher", None) if self._of_tokens else None
        if self.take is not None or self.teacher_take is not None:
            why = f"the term {self.name!r} takes a part of the output"
            return Reads(why=why, logits_at=self.take, to_teacher=rename)
        if takes(self.divergence, "mask") or self._any_vocabulary:
            return Reads(why="its divergence needs all of them at once", to_teacher=rename)
        return READS if rename is None else replace(READS, to_teacher=rename)

    def logits(self, student: Any) -> AnyLogits:
        """Those of the student's output."""
        found: AnyLogits = logits_of(student, "student", self.take)
        return found

    def retain(self, teacher: Any) -> AnyLogits:
        """The teacher's logits."""
        found: AnyLogits = logits_of(teacher, "teacher", self.teacher_take)
        classes = teacher.classes if isinstance(teacher, Captured) else None
        if classes is not None and self.vocabulary is None and not self._any_vocabulary:
            found = classes.in_students_order(found)
        return found.detach()

    def task(self, step: Step, labels: Tensor | None) -> TeacherTask:
        """What the engine has to do; `labels` are those of its rows."""
        if labels is None and step.labels is not None and self.positions == "mask" and takes(self.divergence, "labels"):
            raise ValueError(
                f"the term {self.name!r} compares by the labels, and unlabelled positions that it counts have none; "
                "write positions='labels'"
            )
        temperature: Any = self._temperature
        if callable(temperature):
            temperature = _checks.temperature(schedules.at(temperature, step.number))
        teacher = Mixture(step.teacher, self.weights, self.average) if self.several else step.teacher
        return TeacherTask(self.divergence, teacher, temperature, self.vocabulary, labels)

    def loss(self, step: Step) -> Tensor:
        """The value at every position; see the class."""
        where, task = step.where, self.task(step, step.where.labels)
        there = replace(task, teacher=where.take(task.teacher))
        return there.values(step.logits, where.keep)

    def __repr__(self) -> str:
        name = getattr(self.divergence, "__name__", repr(self.divergence))
        return f"Logits({name}, temperature={self._temperature})"


def _refuse_without_temperature(divergence: Divergence) -> None:
    if parameters(unwrapped(divergence)[0]) and not takes(divergence, "temperature") and not passes_on(divergence):
        word = getattr(divergence, "__name__", type(divergence).__name__)
        raise TypeError(
            f"a divergence is called with temperature=..., which {word} has no parameter for; write "
            f"def {word}(student, teacher, *, temperature=1.0)"
        )
