"""Tasks: what is computed at each position by itself, cross-entropy with labels or a divergence from a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from kdloss import _checks
from kdloss._cross_entropy import cross_entropy
from kdloss.engine.closed_forms import ClosedForm
from kdloss.reduction import parameters, precise, savable, takes
from kdloss.targets import Mixture, ShardedLogits, TopKLogits
from kdloss.targets.kinds import AnyLogits, Classes, against, at, check, chosen_classes, dense

Vocabulary = Callable[[AnyLogits, AnyLogits], tuple[AnyLogits, AnyLogits]]
Pick = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LabelTask:
    """Cross-entropy with labels.

    Labels are classes `[rows]`, int64, at the positions that are computed, or probabilities `[*positions, V]` at all
    positions.
    """

    labels: Tensor
    smoothing: float = 0.0
    class_weights: Tensor | None = None

    @property
    def soft(self) -> bool:
        """Whether labels are probabilities."""
        return self.labels.is_floating_point()

    def check(self, student: AnyLogits) -> None:
        """Raise where labels or weights don't fit the student's logits."""
        if self.soft:
            _checks.soft_labels(self.labels, student)
            if isinstance(student, ShardedLogits):
                raise ValueError("labels that are probabilities need the whole vocabulary in one process")
        else:
            _checks.classes(self.labels, student)
        _checks.target_options(self.smoothing, self.class_weights, student)

    def at(self, pick: Pick) -> "LabelTask":
        """The task at chosen positions; class labels are given for the chosen positions already."""
        return replace(self, labels=pick(self.labels)) if self.soft else self

    def values(self, student: AnyLogits, mask: Tensor | None = None) -> Tensor:
        """The plain function: one value at every position of the student, where the labels are, too."""
        return cross_entropy(precise(dense(student)), self.labels, smoothing=self.smoothing, weight=self.class_weights)


@dataclass(frozen=True)
class TeacherTask:
    """One divergence from one teacher, whose logits are given at all positions.

    `labels`, for a divergence that takes them, are `[rows]` at the positions that are computed. `student_classes` and
    `teacher_classes`, if given, are the only classes compared.
    """

    divergence: Callable[..., Tensor]
    teacher: AnyLogits
    temperature: float = 1.0
    vocabulary: Vocabulary | None = None
    labels: Tensor | None = None
    student_classes: Classes = None
    teacher_classes: Classes = None

    def at(self, pick: Pick) -> "TeacherTask":
        """The task at chosen positions."""
        return replace(self, teacher=at(self.teacher, pick))

    def values(self, student: AnyLogits, mask: Tensor | None = None) -> Tensor:
        """The plain function: one value at every position of the student, where teacher and labels are, too.

        A divergence that compares positions with each other gets the mask, which says which positions count.
        """
        s: AnyLogits = chosen_classes(precise(dense(student)), self.student_classes)
        t = chosen_classes(self.teacher, self.teacher_classes)
        if self.vocabulary is not None:
            s, t = self.vocabulary(s, t)
        if not (isinstance(s, Tensor) and isinstance(t, Tensor) and self._any_vocabulary):
            nothing = t.empty() if isinstance(t, TopKLogits) else None
            s, t = against(s, t, self.temperature)
            if nothing is not None:
                return self.diverge(s, t, mask).masked_fill(nothing, 0)
        return self.diverge(s, t, mask)

    def diverge(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The divergence of logits over the same classes, called with labels and mask if it takes them."""
        if self.labels is None and takes(self.divergence, "labels"):
            raise ValueError(f"{self.name} compares by the labels, and there are none: pass labels=...")
        extra = {"labels": self.labels, "mask": mask}
        extra = {name: x for name, x in extra.items() if x is not None and takes(self.divergence, name)}
        values = as_written(self.divergence)(student, savable(teacher), temperature=self.temperature, **extra)
        if not isinstance(values, Tensor):
            raise _checks.no_tensor(f"the divergence {self.name}", values)
        if values.shape != student.shape[:-1]:
            raise ValueError(
                f"a divergence returns one value per position, {tuple(student.shape[:-1])} for logits "
                f"{tuple(student.shape)}; it returned {tuple(values.shape)}: sum over the last dimension only"
            )
        return values

    def with_rows(self, teacher: AnyLogits, labels: Tensor | None) -> "TeacherTask":
        """The task for some rows; what was found out about the divergence is kept."""
        other = object.__new__(TeacherTask)
        vars(other).update(vars(self) | {"teacher": teacher, "labels": labels, "teacher_classes": None})
        return other

    def over_shared_classes(self, student: AnyLogits) -> "TeacherTask":
        """The task without its vocabulary, if that says which classes student and teacher share.

        The teacher's classes are chosen here for slices and lazy or top-k teachers, else block by block, since
        choosing columns of a tensor or a mixture copies them.
        """
        shared = getattr(self.vocabulary, "shared", None)
        if shared is None or isinstance(student, ShardedLogits):
            return self
        mine, theirs = shared(student, self.teacher)
        teacher = self.teacher
        if isinstance(theirs, slice) or not isinstance(teacher, (Tensor, Mixture)):
            teacher, theirs = chosen_classes(teacher, theirs), None
        return replace(self, vocabulary=None, teacher=teacher, student_classes=mine, teacher_classes=theirs)

    def check(self, student: AnyLogits) -> None:
        """Raise where student and teacher don't fit each other, or the divergence can't use this kind of teacher."""
        teacher = self.teacher
        function = unwrapped(self.divergence)[0]
        if isinstance(teacher, TopKLogits):
            self._refuse_top_k(function, teacher)
        if self._any_vocabulary and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            _checks.logit_shapes(student.shape, teacher.shape, None)
            return
        if self.vocabulary is None:
            check(student, teacher)
        else:
            _checks.logit_shapes(student.shape, teacher.shape, None)
            mapped = self.vocabulary(_no_rows(student), _no_rows(teacher))  # only to see the shapes: no row is copied
            check(*mapped)
            if mapped[0].shape[-1] == 1 and not getattr(function, "one_class", True):
                raise ValueError(
                    f"{self.name} compares probabilities of classes, and vocabulary={self.vocabulary!r} leaves one, "
                    "whose probability is 1: the loss would be 0 whatever the models say"
                )
        if getattr(function, "needs_logits", False) and isinstance(teacher, Mixture) and teacher.of_probabilities:
            raise ValueError(
                f"{self.name} compares logits, an average of probabilities has none; write average='logits'"
            )

    def _refuse_top_k(self, function: Any, teacher: TopKLogits) -> None:
        """Raise for a divergence that can't be computed from a few probabilities, in an order of their own."""
        if getattr(function, "needs_logits", False):
            raise ValueError(f"{self.name} compares logits, top-k logits hold probabilities; take forward_kl")
        if self._any_vocabulary:
            raise ValueError(
                f"{self.name} sorts the probabilities of all classes, and top-k logits hold only a few, by their ids "
                "in the student's vocabulary; give all of the teacher's logits, or take forward_kl with vocabulary="
                "kdloss.TokenMap.of(student_tokenizer, teacher_tokenizer)"
            )
        by_class = getattr(function, "needs_classes", False) or takes(self.divergence, "labels")
        if teacher.tail != "uniform" and (by_class or takes(self.divergence, "mask")):
            raise ValueError(
                f"{self.name} looks up labels or classes by their place among all classes, and top-k logits hold only "
                "a few, others at each position; write TopKLogits(..., tail='uniform')"
            )

    @property
    def name(self) -> str:
        """The divergence's name in error messages."""
        function = unwrapped(self.divergence)[0]
        return getattr(function, "__name__", repr(function))

    @property
    def teacher_temperature(self) -> float | None:
        """The teacher's own temperature, if the divergence sets one."""
        own = getattr(unwrapped(self.divergence)[0], "teacher_temperature", None)
        return None if own is None else float(own)

    @property
    def _any_vocabulary(self) -> bool:
        """Whether the divergence takes two tensors with different numbers of classes."""
        return bool(getattr(unwrapped(self.divergence)[0], "any_vocabulary", False))

    @cached_property
    def closed_form(self) -> tuple[ClosedForm, float] | None:
        """The divergence's closed form, if it has one, and the factor T² of its value."""
        function, options = unwrapped(self.divergence)
        form = getattr(function, "closed_form", None)
        if form is None or function is None:
            return None
        takes_it = parameters(function).get("t_squared")
        squared = takes_it is not None and options.pop("t_squared", takes_it.default)
        options.pop("temperature", None)  # the task's own applies
        return partial(form, **options), self.temperature**2 if squared else 1.0


Task = LabelTask | TeacherTask


def specification(tasks: Sequence[Task], student: AnyLogits, mask: Tensor | None = None) -> list[Tensor]:
    """The values of several tasks at every position, by plain functions."""
    z = precise(dense(student))  # once, so that the tasks' gradients are added before they are rounded
    return [task.values(z, mask) for task in tasks]


def _no_rows(x: AnyLogits) -> AnyLogits:
    return at(x, lambda t: t[:0]) if len(x.shape) > 1 else x


def unwrapped(function: Any) -> tuple[Any, dict[str, Any]]:
    """The function inside `functools.partial`s, and the options they set."""
    options: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args:
        options = {**function.keywords, **options}
        function = function.func
    return function, options


def as_written(divergence: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The plain function of a divergence, without the engine."""
    function, options = unwrapped(divergence)
    plain = getattr(function, "as_written", None)
    if plain is None:
        return divergence
    return partial(plain, **options) if options else plain
