"""What a term reads from the models in one step."""

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
    """What a term reads from the models in one step; by default all that a model returns.

    - `labels`: True if the term needs labels.
    - `logits`: how the term reads the student's logits: "none", not at all; "any", in any form, such as `LazyLogits`;
      "full", only as a tensor, for the reason in `why`.
    - `logits_at`: where in the student's output the logits are, if not at `logits`.
    - `own_loss`: True if the term reads the student's own loss; the student is then given the labels.
    - `teacher_output`: True if the teacher has to run to its end; False if its features are enough.
    - `pairs`: the layers (student, teacher, weight) whose features are read; None if the outputs decide.
      `blocks`, `take` and `teacher_take` find them, as in `kdloss.capture`.
    - `shapes`: True if only the shapes of the features are needed, without data.
    - `to_teacher`: a function that turns the student's token ids into the teacher's, where they differ.
    """

    labels: bool = False
    logits: Literal["none", "any", "full"] = "full"
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
