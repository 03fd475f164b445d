"""A choice of layers and of their partners, before and after the models are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdloss.layers.blocks import block_indices, find_blocks, kept_blocks
from kdloss.layers.names import resolve
from kdloss.layers.pair import distinct, known, pair, weighted
from kdloss.layers.select import select, strategy

Name = int | str


@dataclass
class LayerMap:
    """`layers` and `pairing` as the user gave them, and what was found in the models.

    Blocks are named by index, other modules by name. `depths` are the numbers of blocks of student
    and teacher, `kept` the teacher's blocks that the student was made of.
    """

    layers: Any
    pairing: Any
    blocks: str | None
    depths: tuple[int, int] | None = None
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            strategy(self.layers)
        elif not callable(self.layers) and not len(self.layers):
            raise ValueError("layers is empty; write layers='auto', or name some")
        if isinstance(self.pairing, str):
            known(self.pairing)
        if self._explicit() and self.layers != "auto":
            raise ValueError(
                f"layers={self.layers!r} and pairing={self.pairing!r} both choose student layers; "
                "leave layers out, the pairs say it all"
            )

    def locate(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the blocks of two models."""
        if _has_names(self.layers):
            self.layers = block_indices(student, self.layers, self.blocks) or self.layers
        if self._by_name():
            for s, t, _ in self.pairs():
                _exists(student, s, self.blocks)
                _exists(teacher, t, self.blocks)
            return
        self.depths = (
            len(find_blocks(student, self.blocks)),
            len(find_blocks(teacher, self.blocks)),
        )
        self.kept = kept_blocks(student, self.blocks)
        self.pairs()

    def pairs(self, depths: tuple[int, int] | None = None) -> list[tuple[Name, Name, float]]:
        """Pairs (student, teacher, weight) of block indices or module names; weight 0 drops out."""
        if self._by_name():
            return [p for p in self._named_pairs() if p[2] > 0]
        depths = self.depths or depths
        if depths is None:
            raise ValueError(
                f"layers={self.layers!r} cannot be chosen before the models are known: write "
                "distill.prepare(student) with a kdloss.Distiller, criterion.prepare(student, teacher), "
                "FeatureKD(..., depths=(student_blocks, teacher_blocks)), or pass Hugging Face outputs "
                "made with output_hidden_states=True"
            )
        selected = [] if self._explicit() else select(self.layers, depths[0])
        return [p for p in pair(selected, *depths, self.pairing, self.kept) if p[2] > 0]

    def _named_pairs(self) -> list[tuple[Name, Name, float]]:
        if self._explicit():
            return distinct(weighted(self.pairing), self.pairing)
        if self.pairing != "same":
            raise ValueError(
                f"layers={self.layers!r} are not blocks of the student, so pairing={self.pairing!r} "
                "has no depths to go by; write pairing='same' (the same names in the teacher) or "
                f"pairing=[({self.layers[0]!r}, 'name in the teacher'), ...]"
            )
        pairs = [(name, name) for name in self.layers]
        return distinct(weighted(pairs), pairs)

    def _explicit(self) -> bool:
        return not isinstance(self.pairing, str) and not callable(self.pairing)

    def _by_name(self) -> bool:
        if self._explicit():
            return any(_has_names(p) for p in self.pairing)
        return _has_names(self.layers)


def _has_names(layers: Any) -> bool:
    return (
        isinstance(layers, Sequence)
        and not isinstance(layers, str)
        and any(isinstance(name, str) for name in layers)
    )


def _exists(model: nn.Module, name: Name, blocks: str | None) -> None:
    if isinstance(name, str):
        resolve(model, name)
    else:
        select([name], len(find_blocks(model, blocks)))
