"""Any other loss of the task, as a term."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kdloss._capture import Take
from kdloss._capture.take import described
from kdloss.terms._outputs import otherwise, part_of
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step
from kdloss.terms.term import Term, Where


class Task(Term):
    r"""Any loss function of the task, or the loss that the student itself returns.

    $f(\text{student's output}, \text{labels})$; without f, the student's own `outputs.loss`.

    - `function`: a function of (student output, labels), both as they were passed. It returns one value per position
      (with `causal` one per label, without the first label) or a scalar. None uses `outputs.loss`: the labels are then
      passed to the student, which computes its full logits.
    - `take`: which part of the student's output the function gets: an index, a key, a path or a function. Without a
      function: where the student's own loss is, if not at `loss`.
    - `positions`: "labels" or "mask", as in `kdloss.terms.Term`.
    - `name`: the term's entry in `components`.

    Values at positions that don't count are dropped, and their gradients too; the function itself has to cope with NaN
    inputs there. A scalar is taken as the mean over the positions that count: with reduction "sum" it is multiplied by
    their number, with `num_items_in_batch` it is multiplied by their number and divided by that.

    Raises: TypeError if the student returns no loss; ValueError for values of another shape.

    >>> import torch
    >>> def error(output, labels):
    ...     return (output.squeeze(-1) - labels).square()
    >>> criterion = 1.0 * Task(error)
    >>> criterion(torch.tensor([[1.0], [3.0]]), labels=torch.tensor([1.0, 1.0]))
    tensor(2.)
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tensor] | None = None,
        *,
        take: Take = None,
        positions: Where = "labels",
        name: str = "task",
    ) -> None:
        super().__init__(name=name, positions=positions)
        if function is not None and not callable(function):
            raise TypeError(
                f"function is a function of (student output, labels), got {function!r}; leave it out for the student's "
                "own loss"
            )
        self.function, self.take = function, take

    def reads(self) -> Reads:
        """The student's output as it is; without a function, the student's own loss."""
        if self.function is None:
            return Reads(why="the student computes its own loss", own_loss=True)
        return Reads(why=f"the term {self.name!r} reads the student's output")

    def loss(self, step: Step) -> Tensor:
        """The function's value, or the student's loss; see the class."""
        if self.function is not None:
            part = part_of(step.output, self.take)
            if part is None:
                there = f"{described(step.output)}{otherwise(step.output, self.take)}"
                raise TypeError(f"take={self.take!r} finds nothing in the student's output, {there}")
            return self.function(part, step.labels)
        own = part_of(step.output, "loss" if self.take is None else self.take)
        if not isinstance(own, Tensor):
            raise TypeError(
                f"Task() reads the student's own loss, and there is none in {described(step.output)}: run the student "
                "with labels=... (kdloss.Distiller and kdloss.Distillation do), say where it is by take=..., or give "
                "the loss as Task(function)"
            )
        return own

    def __repr__(self) -> str:
        return f"Task({getattr(self.function, '__name__', self.function or '')})"
