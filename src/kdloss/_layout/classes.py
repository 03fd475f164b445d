"""Move the classes of logits to the last axis."""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor

from kdloss._layout.evidence import FIRST, Evidence
from kdloss._layout.pattern import Layout


def classes_last(
    logits: Any,
    said: Layout | None,
    positions: Sequence[Size],
    whose: str,
    argument: str,
    head: Evidence | None = None,
) -> Any:
    """A view `[B, positions, classes]` of logits. `positions` are the shapes of the labels and the mask, if given.

    `head` is the evidence from the model's last layer.

    Raises: ValueError for a layout with another number of axes, if labels or mask show that the classes are at another
    axis, and if there are four axes or more and nothing shows which one is the classes; TypeError for a layout whose
    classes are not last, if the logits are no plain tensor.
    """
    shape = tuple(logits.shape)
    if said is not None:
        if len(said.axes) != len(shape):
            raise ValueError(
                f"{argument}={said.pattern!r} names {len(said.axes)} axes, and the {whose}'s logits are {shape}; name "
                f"each of the {len(shape)}"
            )
        if isinstance(logits, Tensor):
            return said.width_last(logits)
        if not said.plain:
            raise TypeError(
                f"{type(logits).__name__} have their classes last, and {argument}={said.pattern!r} says otherwise; "
                "leave it out, or give the logits as a tensor"
            )
        return logits
    if isinstance(logits, Tensor) and len(shape) > 2:
        _refuse_other(shape, positions, whose, argument, head or Evidence())
    return logits


def _refuse_other(shape: tuple[int, ...], positions: Sequence[Size], whose: str, argument: str, head: Evidence) -> None:
    """Raise for logits whose classes are not last, or possibly not last."""
    last, second = shape[:-1], (shape[0], *shape[2:])
    fits_last, fits_second = ([tuple(p) == form for p in positions] for form in (last, second))
    names = {3: "t", 4: "h w", 5: "d h w"}.get(len(shape), " ".join(f"x{i}" for i in range(1, len(shape) - 1)))
    convolved = head.axis == FIRST and head.width == shape[1] != shape[-1]
    if not any(fits_last) and (any(fits_second) or convolved):
        told = f"labels or mask {second}" if any(fits_second) else f"the last convolution has {shape[1]} channels"
        raise ValueError(
            f"the {whose}'s logits are {shape}, and {told}: their classes are the second axis. Write "
            f"{argument}='b c {names}', in FeatureKD logit_{argument}"
        )
    if len(shape) > 3 and (any(fits_second) or not any(fits_last)):
        raise ValueError(
            f"the {whose}'s logits are {shape}, and nothing tells which axis their classes are: write "
            f"{argument}='b c {names}' or {argument}='b {names} c', in FeatureKD logit_{argument}"
        )
