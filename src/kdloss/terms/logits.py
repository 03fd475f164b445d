"""A divergence from a teacher's predictions, as a term."""

from collections.abc import Sequence
from dataclasses import replace
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdloss import _checks, schedules
from kdloss._capture import Captured, Take
from kdloss._capture.take import described
from kdloss._classes import predicts_tokens
from kdloss.divergences.forward_kl import forward_kl
from kdloss.engine import Divergence, TeacherTask, Vocabulary
from kdloss.engine.task import unwrapped
from kdloss.reduction import parameters, passes_on, takes
from kdloss.schedules import Setting
from kdloss.targets import Mixture
from kdloss.targets.kinds import AnyLogits
from kdloss.targets.mixture import weights_listed
from kdloss.terms._outputs import logits_of
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step
from kdloss.terms.term import Teachers, Term, Where
from kdloss.weighting import Weighting

READS = Reads(logits="any")


class Logits(Term):
    r"""A divergence between the predictions of student and teacher.

    $d(s, t; T)$; the default d is $T^2\,\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T))$.

    - `divergence`: any function like `kdloss.divergences.forward_kl`; set its options with `functools.partial`. A
      divergence with a parameter `labels` gets the labels, one with a parameter `mask` gets the positions that count.
      `kdloss.divergences.hard_labels` teaches the teacher's most probable class.
    - `temperature`: T, by which the logits of both models are divided; a number, or a function of the step
      (`kdloss.schedules`).
    - `teacher`: an index, several indices, or "all". The student learns from the average of several teachers.
      `weights` has one weight for each of them, non-negative and with sum 1; None weighs them equally. `average` says
      what is averaged: their "probabilities" or their "logits".
    - `vocabulary`: brings two vocabularies or sets of classes together: `kdloss.truncate`, a `kdloss.TokenMap`, or
      any function of (student, teacher) logits. Without one, `kdloss.Distiller` pairs classes by name, in whatever
      order, where both models name them (`config.id2label`; case doesn't matter). Names that differ are refused.
    - `take`, `teacher_take`: which part of the student's and of the teacher's output holds the logits: an index, a
      key, a path or a function. `teacher_take` is the same as `take` unless you pass it. None takes the output itself
      if it is a tensor, else its `logits`.
    - `positions`: "labels", or "mask", which also counts positions without a label.
    - `name`: the term's entry in `components`.

    Shapes: logits `[..., V]` of any kind (tensors, `LazyLogits`, a teacher's `TopKLogits` or `Mixture`).

    Raises: ValueError or TypeError for settings out of range and for logits that don't fit. The message says what to
    write instead.

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
        if isinstance(kind := unwrapped(divergence)[0], type):
            raise TypeError(
                f"a divergence is a function, got the class {kind.__name__}; write an instance of it, such as "
                "kdloss.divergences.standardized(kdloss.divergences.forward_kl) or "
                "kdloss.divergences.with_teacher_temperature(kdloss.divergences.forward_kl, 4.0)"
            )
        if not torch.compiler.is_compiling():
            _refuse_without_temperature(divergence)
        if vocabulary is not None:
            _checks.function("vocabulary", vocabulary, "truncate")
        if isinstance(weights, Weighting):
            raise TypeError(
                f"weights is a list with one number per teacher, got {weights!r}, which multiplies terms: write "
                f"{weights!r} * (kdloss.Logits(teacher=0) + kdloss.Logits(teacher=1, name='second'))"
            )
        if weights is not None:
            weights_listed(weights)
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
        if isinstance(value, nn.Module):
            raise TypeError(
                "temperature is a number or a function of the step, not a module, since it is not trained; got "
                f"{type(value).__name__}; write temperature=2.0, or temperature=lambda step: ..."
            )
        self._temperature = value if callable(value) else _checks.temperature(value)

    @property
    def scheduled(self) -> bool:
        """Whether the temperature depends on the step."""
        return callable(self._temperature)

    def locate(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find out whether the student's classes are tokens; only then a `TokenMap` also translates input ids."""
        self._of_tokens = predicts_tokens(student)

    @property
    def _any_vocabulary(self) -> bool:
        return getattr(unwrapped(self.divergence)[0], "any_vocabulary", False)

    def reads(self) -> Reads:
        """The logits of both models; as one tensor where they can't be computed a block of rows at a time."""
        rename = getattr(self.vocabulary, "to_teacher", None) if self._of_tokens else None
        if self.take is not None or self.teacher_take is not None:
            why = f"the term {self.name!r} takes a part of the output"
            return Reads(why=why, logits_at=self.take, to_teacher=rename)
        if takes(self.divergence, "mask") or self._any_vocabulary:
            return Reads(why="its divergence needs all of them at once", to_teacher=rename)
        return READS if rename is None else replace(READS, to_teacher=rename)

    def logits(self, student: Any) -> AnyLogits:
        """The logits in the student's output."""
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
        """The task for the engine; `labels` belong to the engine's rows."""
        if labels is None and step.labels is not None and self.positions == "mask" and takes(self.divergence, "labels"):
            raise ValueError(
                f"the divergence of the term {self.name!r} reads labels, and positions='mask' counts positions without "
                "a label; write positions='labels'"
            )
        if labels is None and step.labels is not None and takes(self.divergence, "labels"):
            given = described(step.labels)
            raise ValueError(
                f"the divergence of the term {self.name!r} compares by the class of each position, and the labels, "
                f"{given}, name none: soft labels (mixup) have no single class. Pass class indices, or write a "
                "divergence that reads no labels, kdloss.Logits(kdloss.divergences.forward_kl)"
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
            f"a divergence is called with temperature=..., and {word} has no such parameter; write "
            f"def {word}(student, teacher, *, temperature=1.0)"
        )
