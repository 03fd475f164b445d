"""A case of the fuzzer: the tensors and settings of one call of a criterion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kdloss import LazyLogits, TopKLogits


@dataclass
class Leaf:
    """A tensor that needs a gradient, and the function that makes kdloss's view of it."""

    base: Tensor
    view: Callable[[Tensor], Tensor]

    @property
    def seen(self) -> Tensor:
        return self.view(self.base.detach())

    def numpy(self) -> Any:
        return self.seen.double().numpy()


@dataclass
class Logits:
    """The logits of one side: a leaf, hidden states and a head, or a teacher's stored top-k logits."""

    leaves: list[Leaf]
    softcap: float | None = None
    scale: float = 1.0
    kept: TopKLogits | None = None

    @property
    def lazy(self) -> bool:
        return len(self.leaves) > 1

    def build(self, bases: list[Tensor]) -> Any:
        """Build the input of kdloss."""
        if self.kept is not None:
            return self.kept
        seen = [leaf.view(base) for leaf, base in zip(self.leaves, bases, strict=True)]
        return LazyLogits(*seen, softcap=self.softcap, scale=self.scale) if self.lazy else seen[0]

    def given(self) -> Any:
        return self.build([leaf.base.detach() for leaf in self.leaves])


@dataclass
class Term:
    """A term and its weight, which may be trained; `loss` is a row of tests/losses.py with its settings."""

    name: str
    kind: str
    weight: float
    learned: bool = False
    by_mask: bool = False
    loss: Any = None
    temperature: float = 1.0
    teacher: Any = 0
    weights: list[float] | None = None
    average: str = "probabilities"
    vocabulary: Any = None
    smoothing: float = 0.0
    class_weights: Tensor | None = None
    pairs: int = 1
    projection: tuple[Tensor, Tensor] | None = None

    @property
    def function(self) -> str:
        """The name of the divergence or distance."""
        return "" if self.loss is None else self.loss.name.split("-")[0]


@dataclass
class Case:
    """One call of a criterion."""

    words: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    student: Any = None
    teachers: list[Logits] = field(default_factory=list)
    classes: int = 0
    teacher_classes: int = 0
    layout: str | None = None
    hidden: tuple[list[Leaf], list[Leaf]] = field(default_factory=lambda: ([], []))
    labels: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    reduction: str = "mean"
    items: int | None = None
    overwrite: bool = False
    twice: bool = False
    engine: dict[str, int] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    upstream: Any = 1.0
    recipe: str | None = None
    nan_memory: bool = False

    @property
    def kds(self) -> list[Term]:
        """The terms on teachers' logits."""
        return [term for term in self.terms if term.kind == "kd"]

    @property
    def stands(self) -> Any:
        """The positions with values of a loss, as indices into all positions."""
        every = np.arange(int(np.prod(self.shape))).reshape(self.shape)
        return every[:, :-1] if self.causal else every

    def counted(self, term: Term) -> Any:
        """The positions that count for a term, as indices into flattened logits and into flattened labels."""
        keep, at = np.ones(self.shape, bool), np.arange(int(np.prod(self.shape))).reshape(self.shape)
        if self.mask is not None:
            keep &= self.mask.numpy()
        if self.labels is not None and not self.labels.is_floating_point() and not term.by_mask:
            keep &= self.labels.numpy() != -100
        keep, label = (keep[:, 1:], at[:, 1:]) if self.causal else (keep, at)
        return self.stands[keep], label[keep]
