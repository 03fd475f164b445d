"""What a term sees of one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdloss._capture import Take
from kdloss._layout import Layout, classes_last
from kdloss.targets.kinds import AnyLogits
from kdloss.terms._feature_masks import FeatureMask
from kdloss.terms._outputs import logits_of, returned
from kdloss.terms._positions import Positions
from kdloss.terms.reads import Reads


@dataclass(frozen=True)
class Step:
    """One step as a term sees it.

    - `student`: the student's output, or what was captured of it; `teacher` the same of the term's teacher, a
      list where it reads several, None where it reads none.
    - `labels` as they were given. `feature_mask(layer, positions)` is the mask of a layer's features at these
      positions (None: all count), and whether they stand elsewhere than labels though they are as many.
    - `index` says which example of the data set each of the batch is.
    - `where`: the positions that count. `where.take(x)` is a tensor `[*positions, ...]` there, zeroed where nothing
      counts; `where.keep` says where (None: everywhere).
    - `reads`: what the term said it reads; `number`: how many steps were taken before this one.
    - `report(name, values)` adds a component under `name`: the mean of values at the positions that count.
    - `logits`: for `CrossEntropy` and `Logits` the student's, at the positions as by `where.take`.
    - `layout`: what the sum says of the student's logits' axes, if anything; `batch`: how many examples there are,
      where labels, mask or logits tell.
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
    batch: int | None = None

    @property
    def output(self) -> Any:
        """What the student itself returned."""
        return returned(self.student)

    def student_logits(self, take: Take = None) -> AnyLogits:
        """The student's logits, classes last where the sum says their layout; `take` finds others in its output."""
        found: AnyLogits = logits_of(self.student, "student", take)
        if self.layout is not None:
            found = classes_last(found, self.layout, (), "student", "layout")
        return found
