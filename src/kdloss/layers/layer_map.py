"""The user's `layers` and `pairing`, before and after the models are known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdloss.layers.blocks import block_indices, find_blocks, kept_blocks
from kdloss.layers.names import resolve
from kdloss.layers.pair import check_distinct, check_pairing, pair, with_weights
from kdloss.layers.resolution import pair_by_resolution
from kdloss.layers.select import select, strategy

Name = int | str
Layer = Name | tuple[Name, ...]


def flat_names(layers: Iterable[Layer]) -> list[Name]:
    """All module names in `layers`, each once. A tuple stands for modules whose outputs are concatenated."""
    flat = (name for layer in layers for name in (layer if isinstance(layer, tuple) else (layer,)))
    return list(dict.fromkeys(flat))


@dataclass
class LayerMap:
    """`layers` and `pairing` as the user gave them, and what was found in the models.

    Blocks are given by index and other modules by name; a tuple of names stands for their outputs, concatenated.
    `depths` are the numbers of blocks of student and teacher, `kept` the teacher's blocks from which the student
    was made, and `sizes` the sizes of the maps that the blocks of student and teacher return.
    """

    layers: Any
    pairing: Any
    blocks: str | None
    depths: tuple[int, int] | None = None
    kept: list[int] | None = None
    sizes: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            strategy(self.layers)
        elif not callable(self.layers) and not len(self.layers):
            raise ValueError("layers is empty; write layers='auto', or name some")
        if isinstance(self.pairing, str):
            check_pairing(self.pairing)
        if (self._explicit() or self.by_resolution) and self.layers != "auto":
            raise ValueError(
                f"layers={self.layers!r} and pairing={self.pairing!r} both choose student layers; "
                "leave layers out, the pairing says it all"
            )

    def locate(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the blocks or named modules in both models."""
        if _has_names(self.layers) and all(isinstance(name, str) for name in self.layers):
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
        if self.sizes is not None and tuple(map(len, self.sizes)) != self.depths:
            self.sizes = None
        if not self.unmeasured:
            self.pairs()

    @property
    def by_resolution(self) -> bool:
        """Whether pairs are chosen by the sizes of maps."""
        return isinstance(self.pairing, str) and self.pairing == "resolution"

    @property
    def known(self) -> bool:
        """Whether the pairs are known without the models' outputs."""
        return self.depths is not None or self._by_name()

    @property
    def unmeasured(self) -> bool:
        """Whether the sizes of maps still have to be measured before pairs are known."""
        return self.by_resolution and self.sizes is None

    def candidates(self) -> list[tuple[Layer, Layer, float]]:
        """All pairs of a student and a teacher block."""
        students, teachers = self.depths or (0, 0)
        return [(s, t, 1.0) for s in range(students) for t in range(teachers)]

    def pairs(self, depths: tuple[int, int] | None = None) -> list[tuple[Layer, Layer, float]]:
        """Pairs (student, teacher, weight) of block indices or module names, without those of weight 0."""
        if self._by_name():
            return [p for p in self._named_pairs() if p[2] > 0]
        depths = self.depths or depths
        if depths is None:
            raise ValueError(
                f"layers={self.layers!r} cannot be chosen before the models are known: write "
                "model = kdloss.Distillation(student, teacher, criterion), distill.prepare(student) with a "
                "kdloss.Distiller, criterion.prepare(student, teacher), "
                "FeatureKD(..., depths=(student_blocks, teacher_blocks)), or pass Hugging Face outputs "
                "made with output_hidden_states=True"
            )
        if self.by_resolution and self.sizes is not None:
            return list(pair_by_resolution(*self.sizes))
        selected = [] if self._explicit() else select(self.layers, depths[0])
        return [p for p in pair(selected, *depths, self.pairing, self.kept) if p[2] > 0]

    @property
    def names(self) -> list[Name]:
        """The names of all modules on both sides; empty if layers are blocks."""
        return flat_names([layer for s, t, _ in self._named_pairs() for layer in (s, t)]) if self._by_name() else []

    def __str__(self) -> str:
        """The settings, with negative indices resolved once the depths are known."""
        layers, pairing = self.layers, self.pairing
        if self.depths is not None and not self._by_name():
            if self._explicit():
                pairing = pair([], *self.depths, pairing)
            elif not isinstance(layers, str) and not callable(layers):
                layers = select(layers, self.depths[0])
        return f"layers={layers!r}, pairing={pairing!r}, depths={self.depths}"

    def _named_pairs(self) -> list[tuple[Layer, Layer, float]]:
        if self._explicit():
            return check_distinct(with_weights(self.pairing), self.pairing)
        if self.pairing != "same":
            raise ValueError(
                f"layers={self.layers!r} are not blocks of the student, so pairing={self.pairing!r} "
                "has no depths to go by; write pairing='same' (the same names in the teacher) or "
                f"pairing=[({self.layers[0]!r}, 'name in the teacher'), ...]"
            )
        pairs = [(name, name) for name in self.layers]
        return check_distinct(with_weights(pairs), pairs)

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
        and any(isinstance(name, (str, tuple)) for name in layers)
    )


def _exists(model: nn.Module, layer: Layer, blocks: str | None) -> None:
    for name in flat_names([layer]):
        if isinstance(name, str):
            resolve(model, name)
        else:
            select([name], len(find_blocks(model, blocks)))
