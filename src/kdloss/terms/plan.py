"""The terms that a sum computes in one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kdloss._layout import Layout
from kdloss.terms.reads import Reads
from kdloss.weighting import Weighting


@dataclass(frozen=True)
class Plan:
    """The terms of one step, in order, by name. It tells the code that runs the models what to run and capture.

    - `weights`: the weight of each term; terms of weight 0 are left out.
    - `reads`: what each term reads from the models.
    - `teachers`: the indices of the teachers that each term reads.
    - `layout`: the layout of the student's logits, if one was given.
    - `weightings`: the weighting of each term that has one (`kdloss.weighting`).
    - `balance`: the factor by which the sum's balance, if it has one, multiplied each weight.
    """

    weights: Mapping[str, float | Tensor]
    reads: Mapping[str, Reads]
    teachers: Mapping[str, tuple[int, ...]]
    layout: Layout | None = None
    weightings: Mapping[str, Weighting] = field(default_factory=dict)
    balance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def last_teacher(self) -> int:
        """The highest index of a teacher that is read; -1 for none."""
        return max([-1, *(k for several in self.teachers.values() for k in several)])

    def of_teacher(self, k: int) -> list[str]:
        """The terms that read teacher `k`."""
        return [name for name, several in self.teachers.items() if k in several]

    def complete_with(self, k: int) -> list[str]:
        """The terms that can be computed once teacher `k` has run; `k` = -1 gives the terms that read no teacher."""
        return [name for name, several in self.teachers.items() if max([-1, *several]) == k]

    def ends_early(self, k: int) -> bool:
        """Whether only features of teacher `k` are read, so that its pass can stop before the end."""
        return not any(self.reads[name].teacher_output for name in self.of_teacher(k))

    @property
    def why_full(self) -> str | None:
        """The reason why the student's logits have to be a tensor; None if they may be lazy."""
        return next((r.why for r in self.reads.values() if r.logits == "full"), None)

    def why_teacher_whole(self, k: int) -> str | None:
        """The reason why the logits of teacher `k` have to be a tensor; None if they may be lazy."""
        reads = (self.reads[name] for name in self.of_teacher(k))
        return next((r.why for r in reads if r.teacher_output and r.logits != "any"), None)

    @property
    def needs_labels(self) -> bool:
        """Whether a term needs labels."""
        return any(r.labels for r in self.reads.values())

    @property
    def own_loss(self) -> bool:
        """Whether the student's own loss is read."""
        return any(r.own_loss for r in self.reads.values())
