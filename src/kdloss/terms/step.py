"""One step, as a term sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdloss._capture import Captured, Take
from kdloss._layout import Layout, classes_last
from kdloss.reduction import savable
from kdloss.targets.kinds import AnyLogits, at
from kdloss.terms._feature_masks import FeatureMask
from kdloss.terms._outputs import head_of, logits_of, returned
from kdloss.terms._positions import Positions
from kdloss.terms.reads import Reads


@dataclass(frozen=True)
class Step:
    """One step, as a term sees it.

    - `student`: the student's output, or what was captured from it. `teacher`: the same for the term's teacher; a
      list if the term reads several, None if it reads none.
    - `labels`: the labels as they were passed.
    - `where`: the positions that count. `where.take(x)` gives `x` at these positions, `[*positions, ...]`, with zeros
      where a position doesn't count; `where.keep` is the mask (None: all count).
    - `feature_mask(layer, positions)`: the mask of a layer's features at these positions (None: all count), and
      whether these are other positions than those of the labels although there are as many.
    - `reads`: what the term's `reads` returned. `number`: how many steps were taken before this one.
    - `report(name, values)`: adds a component `name`, the mean of `values` over the positions that count.
    - `index`: which example of the data set each example of the batch is.
    - `logits`: for `CrossEntropy` and `Logits`, the student's logits after `where.take`.
    - `layout`, `teacher_layout`: the layouts of the logits, if the sum has one. `batch`: the number of examples, where
      labels, mask or logits tell it.
    """

    student: Any
    teacher: Any
    labels: Any
    where: Positions
    feature_mask: FeatureMask
    reads: Reads
    number: int
    report: Callable[[str, Tensor], None]
    index: Tensor | None = None
    logits: Any = None
    layout: Layout | None = None
    teacher_layout: Layout | None = None
    batch: int | None = None

    @property
    def output(self) -> Any:
        """The student's own output."""
        return returned(self.student)

    def student_logits(self, take: Take = None) -> AnyLogits:
        """The student's logits, with the classes last if the sum has a layout; `take` finds other logits."""
        found: AnyLogits = logits_of(self.student, "student", take)
        if self.layout is not None:
            found = classes_last(found, self.layout, (), "student", "layout", head_of(self.student, take))
        return found

    def teacher_logits(self, take: Take = None) -> AnyLogits:
        """The logits of the term's one teacher; classes with names are in the student's order. `take` finds others.

        Raises: ValueError for a term that reads no teacher, or several.
        """
        if self.teacher is None or isinstance(self.teacher, list):
            read = "no teacher" if self.teacher is None else "several teachers: their outputs are the list step.teacher"
            raise ValueError(f"this term reads {read}; make the term with teacher=0 to read the first one's logits")
        found: AnyLogits = logits_of(self.teacher, "teacher", take)
        if isinstance(self.teacher, Captured) and self.teacher.classes is not None:
            found = self.teacher.classes.in_students_order(found)
        if self.teacher_layout is not None:
            head = head_of(self.teacher, take)
            found = classes_last(found, self.teacher_layout, (), "teacher", "teacher_layout", head)
        return at(found, savable)
