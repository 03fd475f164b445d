"""What a term asks of the models in one step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kdloss._capture import Take
from kdloss.layers.layer_map import Layer

Pairs = Sequence[tuple[Layer, Layer, float]]
Takes = Take | Mapping[int | str, Take]


@dataclass(frozen=True)
class Reads:
    """What a term asks of the models in one step; by default all that a model returns.

    - `labels`: the term can't do without.
    - `logits`: of the student's logits "none" is looked at, "any" kind will do (they may never be made as a
      whole), or they must be there as a tensor, "whole", for the reason given in `why`.
    - `logits_at`: where in the student's output its logits are, if not at `logits`.
    - `own_loss`: the student's own loss is read, so the student is given the labels.
    - `teacher_output`: the teacher runs to its end; False where its features are enough.
    - `pairs`: the layers (student, teacher, weight) whose features are read, None where they follow from the
      outputs; `blocks`, `take` and `teacher_take` find them, as in `kdloss.capture`.
    - `shapes`: the features' shapes are enough: they have no data.
    - `to_teacher`: what makes the teacher's token ids of the student's, where they differ.
    """

    labels: bool = False
    logits: Literal["none", "any", "whole"] = "whole"
    why: str = "a term may want them"
    logits_at: Take = None
    own_loss: bool = False
    teacher_output: bool = True
    pairs: Pairs | None = ()
    blocks: str | None = None
    take: Takes = None
    teacher_take: Takes = None
    shapes: bool = False
    to_teacher: Callable[[Tensor], Tensor] | None = None
