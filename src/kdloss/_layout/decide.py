"""Decide the layout of a layer's features: the stated one, else the default unless there is evidence against it."""

from dataclasses import dataclass

from torch import Tensor

from kdloss._layout.evidence import FIRST, LAST, Evidence
from kdloss._layout.pattern import Layout, read

DEFAULTS = {len(pattern.split()): read(pattern) for pattern in ("b d", "b t d", "b c h w", "b c d h w")}
OTHERS = {(3, FIRST): "b c t", (4, FIRST): "b c h w", (5, FIRST): "b c d h w"}
OTHERS |= {(3, LAST): "b t d", (4, LAST): "b h w c", (5, LAST): "b d h w c"}


@dataclass(frozen=True)
class Tells:
    """What is known about a captured feature besides its shape.

    - `module`: the evidence from its module.
    - `width`: the width in the model's configuration.
    - `inputs`: the number of examples in the model's inputs.
    """

    module: Evidence
    width: int | None = None
    inputs: int | None = None


def decide(
    shape: tuple[int, ...],
    said: Layout | None,
    tells: Tells | None,
    layer: str,
    argument: str,
    alone: int | str | None = None,
) -> Layout:
    """The layout of features of this shape. `layer` and `argument` are their names in error messages.

    `alone` is the layer's name if the fix in the error message applies to this layer only.

    Raises: ValueError if the shape or the module contradicts the stated layout, in its width or its batch, and if no
    layout was stated and the evidence does not decide.

    >>> decide((2, 8, 5, 5), None, None, "layer 'stem'", "layout").pattern
    'b c h w'
    """
    if said is None:
        return _default(shape, tells, layer, argument, alone)
    if len(said.axes) != len(shape):
        raise ValueError(
            f"{argument}={said.pattern!r} names {len(said.axes)} axes, and {layer} gives {shape}; name each of its "
            f"{len(shape)}"
        )
    told = None if tells is None else tells.module
    if told is not None and told.sure and told.width not in (None, shape[said.width]):
        axis = next((axis for axis in (FIRST, LAST) if shape[axis] == told.width), None)
        raise ValueError(
            f"{argument}={said.pattern!r} reads {layer}, which gives {shape}, as {shape[said.width]} wide, but its "
            f"module has {told.width} channels{_write(argument, OTHERS.get((len(shape), axis or 0)))}"
        )
    if told is not None and told.sure:
        _refuse_axes(shape, said, told, layer, argument)
    return said


def _refuse_axes(shape: tuple[int, ...], said: Layout, told: Evidence, layer: str, argument: str) -> None:
    """Raise for a stated layout with the width or the batch at another axis than the module that defines them."""
    axes = len(shape)
    width, batch = None if told.axis is None else told.axis % axes, _batch(told, axes)
    if width not in (None, said.width):
        raise ValueError(
            f"{argument}={said.pattern!r} reads axis {said.width} of {layer}, which gives {shape}, as the width, but "
            f"its module has {told.width} channels at axis {width}"
            f"{_write(argument, OTHERS.get((axes, told.axis or 0)))}"
        )
    if batch not in (None, said.batch):
        raise ValueError(
            f"{argument}={said.pattern!r} reads axis {said.batch} of {layer}, which gives {shape}, as the batch, but "
            f"its module has the batch at axis {batch}: write {argument}={said.swapped(batch)!r}"
        )


def _batch(told: Evidence, axes: int) -> int | None:
    """The axis of the batch in the output of a module that defines it."""
    if not told.sure:
        return None
    return 0 if told.axis == FIRST else told.batch if axes == 3 else None


def check_batch(
    shape: tuple[int, ...],
    layout: Layout,
    said: bool,
    settled: bool,
    tells: Tells | None,
    batch: int | None,
    layer: str,
    argument: str,
) -> None:
    """Raise for features whose batch is at another axis or at none.

    `batch` is the size of labels, mask or logits. If it is None, the model's inputs tell it, except where a stated
    layout agrees with the module, since inputs may have time first. `said`: the layout was stated. `settled`: it
    passed this check before, so sizes that are equal by chance don't matter.
    """
    here = shape[layout.batch]
    others = [i for i in range(len(shape)) if i not in (layout.batch, layout.width)]
    told, inputs = (Evidence(), None) if tells is None else (tells.module, tells.inputs)
    if not said and not settled and len(shape) == 3:
        second, undecided = told.batch == 1, batch is None or here != batch or shape[1] == batch
        if second and (told.sure or undecided):
            instead = "" if told.sure else f", or {argument}='b t d' if it turns them around"
            raise ValueError(
                f"{layer} gives {shape}, and in it are layers whose batch is the second axis (batch_first=False): "
                f"write {argument}='t b d'{instead}"
            )
    if batch is None and not settled and len(shape) == 3 and not (said and told.batch == layout.batch):
        batch = inputs if inputs in [shape[i] for i in others] else None
    if batch is None or here == batch:
        return
    there, sure = next((i for i in others if shape[i] == batch), None), _batch(told, len(shape))
    ways = []
    if there is not None and sure in (None, there):
        ways.append(f"write {argument}={layout.swapped(there)!r}")
    if inputs == here or sure == layout.batch:
        ways.append("where the logits have time first write kdloss.Sum(..., layout='t b c'), in FeatureKD logit_layout")
    instead = f": {'; '.join(ways)}" if ways else ""
    if there is None:
        instead += (
            ", and no axis of it is as long. If the positions of several examples stand in one row, make a row of "
            "each by take=..., a function of the module's output"
        )
    raise ValueError(
        f"{layer} gives {shape}, which as {layout.pattern!r} is a batch of {here}, but there are {batch} examples in "
        f"the batch{instead}"
    )


def _default(shape: tuple[int, ...], tells: Tells | None, layer: str, argument: str, alone: int | str | None) -> Layout:
    axes = len(shape)
    if axes not in DEFAULTS:
        raise ValueError(
            f"{layer} gives {shape}, which has no default layout; name its axes by {argument}='...': b the batch, "
            "c the width, and a word for each other axis, the positions"
        )
    if axes == 2 or (axes < 5 and tells is None):
        return DEFAULTS[axes]
    fits = _fits(shape, tells)
    if len(fits) > 1:
        raise ValueError(
            f"{layer} gives {shape}, and nothing tells which axis its channels are: write "
            f"{argument}={OTHERS[axes, FIRST]!r} or {argument}={OTHERS[axes, LAST]!r}"
        )
    (axis,) = fits
    if OTHERS[axes, axis] != DEFAULTS[axes].pattern:
        raise ValueError(
            f"{layer} gives {shape}, which is read as {DEFAULTS[axes].pattern!r} where nothing else is said, but its "
            f"{'last' if axis == LAST else 'second'} axis is that of its {shape[axis]} channels"
            f"{_write(argument, OTHERS[axes, axis], alone)}"
        )
    return DEFAULTS[axes]


def _fits(shape: tuple[int, ...], tells: Tells | None) -> list[int]:
    """The axes where the width can be: FIRST, LAST, or both if the evidence does not decide."""
    default = LAST if len(shape) == 3 else FIRST
    if tells is None:
        return [FIRST, LAST]
    told, maps = tells.module, len(shape) == 4 and tells.module.maps is not None
    if len(shape) == 3 and tells.width == shape[LAST] and not told.sure:
        return [default]
    width = tells.width if told.width is None else told.width
    fits = [axis for axis in (FIRST, LAST) if shape[axis] == width]
    if len(fits) == 1:
        against = len(shape) > 3 and fits != [default] and not told.sure and told.axis not in (None, *fits)
        return (
            [FIRST, LAST] if against else fits
        )  # the length fits, but the layers inside have their width at the other axis
    kind = told.maps if maps and not told.sure else told.axis
    if kind is not None and (fits or len(shape) < 5 or width is None):
        return [kind]
    return [FIRST, LAST] if len(shape) == 5 or (len(shape) == 4 and told.conflicting) else [default]


def standard(x: Tensor) -> Tensor:
    """Features `[B, positions, width]` as `resize` takes them: `[B, C, ...]` for several axes of positions."""
    return x.movedim(-1, 1) if x.ndim > 3 else x


def width_last(x: Tensor) -> Tensor:
    """The inverse of `standard`."""
    return x.movedim(1, -1) if x.ndim > 3 else x


def _write(argument: str, pattern: str | None, alone: int | str | None = None) -> str:
    if not pattern:
        return ""
    return f": write {argument}={pattern!r}" if alone is None else f": write {argument}={{{alone!r}: {pattern!r}}}"
