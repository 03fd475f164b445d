"""Layout patterns: a name for each axis of a tensor, as in einops."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor

Pattern = str | None
Patterns = Pattern | Mapping[int | str, Pattern]


@dataclass(frozen=True)
class Layout:
    """The axes of a tensor: b is the batch, c (or d) the width or the classes; all others are positions, in order."""

    axes: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The pattern as a string."""
        return " ".join(self.axes)

    @property
    def batch(self) -> int:
        """The axis of the examples."""
        return self.axes.index("b")

    @property
    def width(self) -> int:
        """The axis of the width or the classes."""
        return self.axes.index("c" if "c" in self.axes else "d")

    @property
    def order(self) -> tuple[int, ...]:
        """The order of axes that puts the batch first and the width last."""
        ends = self.batch, self.width
        return self.batch, *(i for i in range(len(self.axes)) if i not in ends), self.width

    @property
    def plain(self) -> bool:
        """Whether the batch is already first and the width last."""
        return self.order == tuple(range(len(self.axes)))

    def width_last(self, x: Tensor) -> Tensor:
        """A view of `x` as `[B, positions, width]`."""
        return x if self.plain else x.permute(self.order)

    def shape(self, shape: Size | tuple[int, ...]) -> Size:
        """The shape of that view."""
        return Size(shape[i] for i in self.order)

    def swapped(self, axis: int) -> str:
        """The pattern with the batch moved to another axis, in exchange for that one."""
        axes = list(self.axes)
        axes[axis], axes[self.batch] = "b", axes[axis]
        return " ".join(axes)


def read(pattern: str, argument: str = "layout") -> Layout:
    """The layout of a pattern.

    Raises: TypeError unless it is a string; ValueError for a pattern without a batch or a width, or with a name twice.

    >>> read("b c h w").order
    (0, 2, 3, 1)
    """
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} names the axes in a string like 'b c h w' or 't b d', got {pattern!r}")
    axes = tuple(pattern.split())
    wrong = (
        "has names that are no words"
        if not all(axis.isidentifier() for axis in axes)
        else "names an axis twice"
        if len(set(axes)) < len(axes)
        else "names no batch, b"
        if "b" not in axes
        else "names no width, c (or d)"
        if not {"c", "d"} & set(axes)
        else None
    )
    if wrong:
        raise ValueError(
            f"{argument}={pattern!r} {wrong}; write one word for each axis: b is the batch, c the width or the classes "
            "(else d), the others are positions, as in 'b c h w', 'b h w c', 'b c t' or 't b d'"
        )
    return Layout(axes)


def read_each(patterns: Patterns, argument: str) -> Layout | Mapping[int | str, Layout | None] | None:
    """One layout for all layers, or one for each name."""
    if isinstance(patterns, Mapping):
        return {name: None if one is None else read(one, argument) for name, one in patterns.items()}
    return None if patterns is None else read(patterns, argument)
