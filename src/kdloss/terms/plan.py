"""What a sum does in one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kdloss._layout import Layout
from kdloss.terms.reads import Reads
from kdloss.weighting import Weighting


@dataclass(frozen=True)
class Plan:
    """The terms of one step, in their order, by name. Whoever runs the models asks it what they have to give.

    - `weights`: what each is multiplied by; terms of weight 0 are not in it.
    - `reads`: what each reads of the models.
    - `teachers`: the teachers that each reads, as indices.
    - `layout`: that of the student's logits, where it was said.
    - `weightings`: for terms that are weighed by what teachers say, the weighting.
    - `balance`: what a balance multiplied each weight with, if there is one.
    """

    weights: Mapping[str, float | Tensor]
    reads: Mapping[str, Reads]
    teachers: Mapping[str, tuple[int, ...]]
    layout: Layout | None = None
    weightings: Mapping[str, Weighting] = field(default_factory=dict)
    balance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def last_teacher(self) -> int:
        """The highest teacher that is read; -1 for none."""
        return max([-1, *(k for several in self.teachers.values() for k in several)])

    def of_teacher(self, k: int) -> list[str]:
        """The terms that read teacher `k`."""
        return [name for name, several in self.teachers.items() if k in several]

    def complete_with(self, k: int) -> list[str]:
        """The terms that have all their teachers when teacher `k` has run; -1 for those that read none."""
        return [name for name, several in self.teachers.items() if max([-1, *several]) == k]

    def ends_early(self, k: int) -> bool:
        """Whether features are all that is read of teacher `k`."""
        return not any(self.reads[name].teacher_output for name in self.of_teacher(k))

    @property
    def why_whole(self) -> str | None:
        """Why the student's logits must be there as a tensor, if they must."""
        return next((r.why for r in self.reads.values() if r.logits == "whole"), None)

    def why_teacher_whole(self, k: int) -> str | None:
        """Why the logits of teacher `k` must be there as a tensor, if they must."""
        reads = (self.reads[name] for name in self.of_teacher(k))
        return next((r.why for r in reads if r.teacher_output and r.logits != "any"), None)

    @property
    def needs_labels(self) -> bool:
        """Whether a term can't do without labels."""
        return any(r.labels for r in self.reads.values())

    @property
    def own_loss(self) -> bool:
        """Whether the student's own loss is read."""
        return any(r.own_loss for r in self.reads.values())
