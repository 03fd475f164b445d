"""The layouts of one model's features."""

from collections.abc import Mapping
from types import EllipsisType

from torch import Tensor

from kdloss._layout import Evidence, Layout, Patterns, Tells, check_batch, decide, read_each

Batch = int | EllipsisType | None


class Axes:
    """The layouts of the student's or the teacher's features: those given, and those found for other layers.

    A layer's layout is decided when the layer is first seen. Later shapes may contradict it, which raises, but they
    never change it.
    """

    def __init__(self, whose: str, said: Patterns = None, argument: str = "layout") -> None:
        self.whose, self.argument, self._said = whose, argument, read_each(said, argument)
        self._widths: dict[tuple[int | str, int, Evidence], tuple[Layout, Evidence]] = {}
        self._batches: set[tuple[int | str, int, Evidence]] = set()

    @property
    def names(self) -> list[int | str]:
        """The layers whose layout was given by name."""
        return list(self._said) if isinstance(self._said, Mapping) else []

    def of(self, name: int | str) -> Layout | None:
        """The layout given for a layer, if any."""
        return self._said.get(name) if isinstance(self._said, Mapping) else self._said

    def width_last(self, features: Tensor, name: int | str, tells: Tells | None, batch: Batch = ...) -> Tensor:
        """A layer's features with the batch first and the width last.

        `batch` is the number of examples, known from labels or logits; None if nothing tells it, and ... if it is not
        to be checked.
        """
        shape, said = tuple(features.shape), self.of(name)
        layer = f"{self.whose} {'block' if isinstance(name, int) else 'layer'} {name!r}"
        layout = self._decided(shape, name, said, tells, layer)
        if not isinstance(batch, EllipsisType):
            key = None if tells is None else (name, len(shape), tells.module)
            settled = key in self._batches
            check_batch(shape, layout, said is not None, settled, tells, batch, layer, self.argument)
            if key is not None and not settled:
                self._batches.add(key)
        return layout.width_last(features)

    def _decided(
        self, shape: tuple[int, ...], name: int | str, said: Layout | None, tells: Tells | None, layer: str
    ) -> Layout:
        if said is not None or tells is None:
            return decide(shape, said, tells, layer, self.argument)
        key = name, len(shape), tells.module
        if (before := self._widths.get(key)) is not None:
            layout, module = before
            return decide(shape, layout, Tells(module, tells.width, tells.inputs), layer, self.argument)
        others = any(len(shape) == axes > 2 for other, axes, _ in self._widths if other != name)
        alone = name if others else None  # the others were decided by the default
        layout, width = decide(shape, None, tells, layer, self.argument, alone), tells.module.width
        held = width is not None and shape[layout.width] == width
        self._widths[key] = layout, Evidence(width, sure=True) if held else Evidence()
        return layout
