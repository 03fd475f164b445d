"""The base class of all terms."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdloss import _checks
from kdloss._capture import Captured
from kdloss.reduction import TRACES_MODULES
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step

Teachers = int | Sequence[int] | Literal["all"]
Where = Literal["labels", "mask"]


class WithProperties(nn.Module):
    """A module whose properties get what is assigned to them, even if it is a module or a parameter."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):  # nn.Module would register it instead
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Term(WithProperties):
    """One loss to be weighted and added to others: `0.3 * term + other` is a `kdloss.Sum`.

    To write a term of your own, inherit from this class and define `loss`. It gets one step (`kdloss.terms.Step`) and
    returns one value per position, or one number. By default a term may read everything that the models return; define
    `reads` (`kdloss.terms.Reads`) to ask for less. A term's own parameters are trained with the student.

    - `name`: the term's entry in `components`.
    - `teacher`: which teachers the term reads: an index, several indices, "all", or () for none. The step then has
      `teacher_logits()`, or in `teacher` what each of them returned.
    - `positions`: "labels" counts a position if the labels and the mask both keep it; "mask" counts it if the mask
      keeps it, with or without a label.

    >>> import torch, kdloss
    >>> class Confidence(kdloss.terms.Term):
    ...     def loss(self, step):
    ...         return step.where.take(step.student_logits()).softmax(-1).square().sum(-1)
    >>> criterion = kdloss.CrossEntropy() + 0.1 * Confidence(name="confidence")
    >>> criterion(torch.zeros(2, 4), labels=torch.tensor([1, 2]))  # log 4 + 0.1 / 4
    tensor(1.4113)
    >>> class Margin(kdloss.terms.Term):
    ...     def loss(self, step):
    ...         z, t = step.where.take(step.student_logits()), step.where.take(step.teacher_logits())
    ...         return (z.amax(-1) - t.amax(-1)).abs()
    >>> Margin(teacher=0)(torch.zeros(2, 4), torch.ones(2, 4))
    tensor(1.)
    """

    def __init__(self, *, name: str = "term", teacher: Teachers = (), positions: Where = "labels") -> None:
        if torch.compiler.is_compiling() and not TRACES_MODULES:  # with graph breaks torch makes it outside the graph
            raise RuntimeError(
                f"{type(self).__name__} is made inside a function compiled with fullgraph=True: make terms and "
                "criteria before, and compile what calls them"
            )
        super().__init__()
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
            raise ValueError(
                f"a term's name is a word without dots that is no attribute of torch.nn.ModuleDict, got {name!r}; "
                "write name='...'"
            )
        _checks.choice("positions", positions, ("labels", "mask"))
        self.name = name
        self.teacher = _indices(teacher)
        self.several = not isinstance(teacher, int) and self.teacher != ()
        self.positions: Where = positions

    def reads(self) -> Reads:
        """What this term reads from the models in this step."""
        return Reads()

    def loss(self, step: Step) -> Tensor:
        """Compute one value for each of the step's positions, or one number for all of them."""
        raise NotImplementedError(f"{type(self).__name__} is a term without a loss: define loss(self, step)")

    def forward(self, *args: Any, **settings: Any) -> Tensor:
        """The loss of a `kdloss.Sum` of this term alone, called with the same `args` and `settings`."""
        loss: Tensor = (1.0 * self)(*args, **settings)
        return loss

    def retain(self, teacher: Any) -> Any:
        """The part of a teacher's output that this term needs; the rest is freed before the next teacher runs."""
        return teacher

    def locate(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find the blocks that the term reads in `student` and `teachers`, once; a stored teacher is None."""

    def prepare(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Build the trained modules from the configurations of `student` and `teachers`, before the optimizer."""
        self.locate(student, teachers)

    def candidates(self) -> Reads | None:
        """What has to be captured from both models so that `measure` can build the trained modules."""
        return None

    def measure(self, student: Captured, teacher: Captured) -> None:
        """Build the trained modules for the candidates captured from `student` and `teacher`."""

    @property
    def scheduled(self) -> bool:
        """Whether anything in the term, apart from its weight, depends on the step."""
        return False

    def teachers(self, count: int) -> tuple[int, ...]:
        """The indices of the teachers that the term reads, out of `count` teachers."""
        if self.teacher == "all":
            return tuple(range(count))
        for k in self.teacher:
            if k >= count:
                raise ValueError(
                    f"the term {self.name!r} reads teacher {k}, counted from 0, and there "
                    f"{'is one' if count == 1 else f'are {count}'}; pass them as a list"
                )
        named: tuple[int, ...] = self.teacher
        return named

    def __mul__(self, weight: Any) -> "Any":
        from kdloss.terms.sum import Sum  # here, since that module imports this one

        return Sum(self) * weight

    __rmul__ = __mul__

    def __add__(self, other: Any) -> "Any":
        from kdloss.terms.sum import Sum

        return Sum(self) + other

    __radd__ = __add__  # the order of terms doesn't matter; Python's sum(terms) begins with 0


def _indices(teacher: Any) -> Any:
    if teacher == "all":
        return teacher
    several = (teacher,) if isinstance(teacher, int) else tuple(teacher)
    if any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in several) or len(set(several)) < len(several):
        raise ValueError(f"teacher is an index from 0, or several different ones, or 'all', got {teacher!r}")
    return several
