"""Move the classes of logits to the last axis."""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor

from kdloss._layout.evidence import FIRST, NOTHING, Evidence
from kdloss._layout.pattern import Layout


def classes_last(
    logits: Any,
    said: Layout | None,
    positions: Sequence[Size],
    whose: str,
    argument: str,
    head: Evidence = NOTHING,
    turned: set[Any] | None = None,
) -> Any:
    """A view `[B, positions, classes]` of logits. `positions` are the shapes of the labels and the mask, if given.

    `head` is the evidence from the model's last layer. `turned` remembers last layers with channels second whose
    channels came last, so that a later length that is equal by chance does not reopen the question.

    Raises: ValueError for logits without an axis of classes, for a layout with another number of axes or against the
    evidence, if labels, mask or the last layer show that the classes are at another axis, and if nothing shows which
    axis they are; TypeError for a layout whose classes are not last, if the logits are no plain tensor.
    """
    shape = tuple(logits.shape)
    if len(shape) < 2 and Size(()) not in positions:  # a single label says that there is a single position
        raise ValueError(
            f"the {whose}'s logits are {shape}, and have no axis for the classes beside that of the examples. Where a "
            f"head gives one number per example write {_take(whose)}=lambda output: output.unsqueeze(-1), for a single "
            "example logits[None]"
        )
    if said is not None:
        if len(said.axes) != len(shape):
            raise ValueError(
                f"{argument}={said.pattern!r} names {len(said.axes)} axes, and the {whose}'s logits are {shape}; name "
                f"each of the {len(shape)}"
            )
        if isinstance(logits, Tensor):
            _refuse_said(shape, said, whose, argument, head)
            return said.width_last(logits)
        if not said.plain:
            raise TypeError(
                f"{type(logits).__name__} have their classes last, and {argument}={said.pattern!r} says otherwise; "
                "leave it out, or give the logits as a tensor"
            )
        return logits
    if isinstance(logits, Tensor) and (len(shape) > 2 or head.width == 1):
        _refuse_other(shape, positions, whose, argument, head, set() if turned is None else turned)
    return logits


def _refuse_said(shape: tuple[int, ...], said: Layout, whose: str, argument: str, head: Evidence) -> None:
    """Raise for a layout that contradicts the model's last layer."""
    axis = None if head.axis is None else head.axis % len(shape)
    if axis is None or shape[axis] != head.width or said.width == axis:
        return
    if head.sure or shape[said.width] != head.width:
        write = (_second if axis == FIRST else _last)(len(shape))
        raise ValueError(
            f"{argument}={said.pattern!r} reads axis {said.width} of the {whose}'s logits {shape} as the classes, but "
            f"its last layer has {head.width} channels, at axis {axis}: write {argument}={write!r}. {_otherwise(whose)}"
        )


def _refuse_other(
    shape: tuple[int, ...], positions: Sequence[Size], whose: str, argument: str, head: Evidence, turned: set[Any]
) -> None:
    """Raise for logits whose classes are not last, or possibly not last."""
    axes, last, second = len(shape), shape[:-1], (shape[0], *shape[2:])
    fits_last, fits_second = (any(tuple(p) == form for p in positions) for form in (last, second))
    if head.width == 1 and head.axes == axes + 1 and not fits_last:
        raise ValueError(
            f"the {whose}'s logits are {shape}, and its last convolution has one channel, which was squeezed: no axis "
            f"is the classes. Write {_take(whose)}=lambda output: output.unsqueeze(1) and "
            f"{argument}={_second(axes + 1)!r}. {_otherwise(whose)}"
        )
    if axes < 3:
        return
    alike, layer = shape[1] == shape[-1], (argument, head)
    convolved = head.axis == FIRST and head.width == shape[1]
    if head.axis == FIRST and head.width == shape[-1] and not alike:
        turned.add(layer)
    if (convolved and head.sure) or (not fits_last and (fits_second or (convolved and not alike))):
        stand = "labels or mask" if whose == "student" else "the student's positions"
        told = f"{stand} {second}" if fits_second else f"the last convolution has {shape[1]} channels"
        raise ValueError(
            f"the {whose}'s logits are {shape}, and {told}: their classes are the second axis. Write "
            f"{argument}={_second(axes)!r}, in FeatureKD logit_{argument}"
        )
    if (fits_second or not fits_last) if axes > 3 else (convolved and alike and layer not in turned):
        raise ValueError(
            f"the {whose}'s logits are {shape}, and nothing tells which axis their classes are: write "
            f"{argument}={_second(axes)!r} or {argument}={_last(axes)!r}, in FeatureKD logit_{argument}"
        )


def _second(axes: int) -> str:
    return " ".join(("b", "c", *_positions(axes)))


def _last(axes: int) -> str:
    return " ".join(("b", *_positions(axes), "c"))


def _positions(axes: int) -> Sequence[str]:
    """Names of the axes of positions among so many axes."""
    return {3: "t", 4: "hw", 5: "dhw"}.get(axes) or [f"x{i}" for i in range(1, axes - 1)]


def _take(whose: str) -> str:
    return "take" if whose == "student" else "teacher_take"


def _otherwise(whose: str) -> str:
    return f"If another layer makes the logits, choose them by {_take(whose)}=function, which nothing checks"
