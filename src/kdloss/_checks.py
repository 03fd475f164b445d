"""Checks of arguments; their errors say what was expected, what was passed and what to write."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Size, Tensor


def temperature(value: float) -> float:
    """Check a softmax temperature: a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(value).__name__}: {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"temperature must be finite and above 0, got {value!r}")
    return float(value)


def fraction(name: str, value: float) -> float:
    """Check a weight between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number between 0 and 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    return float(value)


def weight(name: str, value: object) -> float:
    """Check a weight of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def number(name: str, value: object) -> float:
    """Check a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> float:
    """Check a finite number above 0."""
    if number(name, value) <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def function(name: str, value: object, example: str) -> None:
    """Check that this is a function, not its name or its result."""
    if not callable(value):
        raise TypeError(
            f"{name} is a function like kdloss.{example}, got {value!r}; write {name}=kdloss.{example}, or "
            f"functools.partial(kdloss.{example}, ...) to set its options"
        )


def choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Check that a value is one of the allowed words."""
    words = list(allowed)
    if value not in words:
        near = get_close_matches(str(value), words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is unknown; choose one of {words}{hint}")


def no_tensor(what: str, values: object) -> TypeError:
    """The error for a loss that is no tensor. Make it only then: `what` may be long."""
    plain = values is None or isinstance(values, (bool, int, float))
    return TypeError(
        f"{what} returned {values if plain else f'a {type(values).__name__}'}; a loss is a tensor, one value per "
        "position or one number, and the gradient goes through it: end the function with `return loss`, without .item()"
    )


def floating(name: str, tensor: Tensor) -> None:
    """Check that this is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}; write {name}.float()")


@runtime_checkable
class Placed(Protocol):
    """A tensor, or logits of another kind."""

    @property
    def shape(self) -> Size: ...

    @property
    def device(self) -> torch.device: ...


def same_place(name: str, student: Placed, other: Placed) -> None:
    """Check that both are on one device: nothing is copied silently."""
    if student.device != other.device:
        raise ValueError(
            f"student is on {student.device} and {name} on {other.device}; write {name}.to({str(student.device)!r})"
        )


def pair(what: str, student: Tensor, teacher: Tensor) -> None:
    """Check student and teacher tensors of one kind: same shape, same device, floating point."""
    floating(f"student {what}", student)
    floating(f"teacher {what}", teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {what} have shape {tuple(student.shape)} and teacher {what} "
            f"{tuple(teacher.shape)}; they must be equal, nothing is broadcast"
        )
    same_place(f"teacher {what}", student, teacher)


def rows(name: str, student: Tensor, teacher: Tensor, same_width: bool, least: int) -> None:
    """Check features `[N, D]` or `[B, N, D]` whose N rows are compared with each other."""
    floating("student features", student)
    floating("teacher features", teacher)
    s, t = tuple(student.shape), tuple(teacher.shape)
    if student.ndim not in (2, 3):
        raise ValueError(
            f"{name} compares the rows of features [N, D] or [B, N, D], got {s}; convert maps [B, C, H, W] by "
            f"kdloss.distances.tokens(features), other shapes by features.flatten(1, -2)"
        )
    if s[:-1] != t[:-1] or (same_width and s != t):
        alike = "be equal" if same_width else "be equal but for the width"
        raise ValueError(
            f"student features have shape {s} and teacher features {t}; they must {alike}, nothing is broadcast"
        )
    if 0 < student.shape[-2] < least:
        raise ValueError(
            f"{name} compares at least {least} rows with each other, got {student.shape[-2]} in {s}; give "
            "more at a time (a data loader's drop_last=True), or compare all positions of a batch: "
            f"kdloss.distances.between_tokens(kdloss.distances.{name})"
        )
    same_place("teacher features", student, teacher)


def whole_number(name: str, value: int) -> int:
    """Check a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    return value


def one_width(name: str, student: int, teacher: int) -> int:
    """Check that student and teacher have the same width, and return it."""
    if student != teacher:
        raise ValueError(
            f"{name} compares features of one width, got {student} (student) and {teacher} (teacher). The "
            f"student's features come projected: write kdloss.distances.{name}({teacher}, {teacher})"
        )
    return whole_number("width", teacher)


def grid(size: tuple[int, ...], positions: int) -> tuple[int, ...] | None:
    """The grid `size` for this many positions, with one -1 filled in; None where they don't fill the grid."""
    others = math.prod([n for n in size if n != -1])
    found = tuple(positions // max(others, 1) if n == -1 else n for n in size)
    fits = min(found, default=0) > 0 and list(size).count(-1) < 2 and math.prod(found) == positions
    return found if fits else None


def heads(name: str, heads: int, parts: int, *widths: int) -> None:
    """Check widths of projections: `parts` (query, key, value) of `heads` heads each, side by side."""
    whole_number(f"{name}'s number of heads", heads)
    whole_number(f"{name}'s number of parts", parts)
    if any(width % (heads * parts) for width in widths):
        student, teacher = widths
        raise ValueError(
            f"{name} splits the width into {parts} parts (queries, keys, values side by side) of {heads} "
            f"heads each, so it is a multiple of {heads * parts}; got {student} (student) and {teacher} "
            "(teacher). Give torch.cat([queries, keys, ...], -1) and the number of heads that both have"
        )


def logits(student: Tensor, teacher: Tensor) -> None:
    """Check logits `[..., V]` of student and teacher over one vocabulary."""
    floating("student logits", student)
    floating("teacher logits", teacher)
    logit_shapes(student.shape, teacher.shape, teacher.shape[-1] if teacher.ndim else 0)
    same_place("teacher logits", student, teacher)


def logit_shapes(student: Size, teacher: Size, teacher_classes: int | None) -> None:
    """Check that logits have the same positions and the same classes (None: the teacher's number isn't known)."""
    if not student or not teacher or student[-1] == 0 or teacher_classes == 0:
        raise ValueError(
            "logits need a last dimension of one entry per class, got shapes "
            f"{tuple(student)} (student) and {tuple(teacher)} (teacher)"
        )
    s, t = student[-1], teacher_classes
    if student[:-1] != teacher[:-1]:
        raise ValueError(
            f"student logits have shape {tuple(student)} and teacher logits {tuple(teacher)}; "
            "they must stand at the same positions, nothing is broadcast"
        )
    if t is not None and s != t:
        raise ValueError(
            f"the student has {s} classes and the teacher {t} ({tuple(student)} and {tuple(teacher)}). If the first "
            "ones are the same (vocabularies padded to a size), compare over the common prefix: "
            "VanillaKD(vocabulary=kdloss.truncate), or kdloss.truncate(student, teacher); otherwise pair them by name, "
            "tokens by vocabulary=kdloss.TokenMap.of(student_tokenizer, teacher_tokenizer), classes by "
            "vocabulary=kdloss.TokenMap.of(student.config.label2id, teacher.config.label2id)"
        )


def mask(mask: Tensor, shape: torch.Size, what: str) -> None:
    """Check a boolean mask (True = keep) of exactly this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor (True = keep), got {came}; write mask.bool()")
    if mask.shape != shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but {what} have shape {tuple(shape)}; give one entry per position"
        )


def labels(labels: Tensor, logits: Placed) -> None:
    """Check integer class indices, one per position of the logits."""
    classes(labels, logits)
    if labels.shape != logits.shape[:-1]:
        several = f". Where these are no classes, {INSTEAD}" if labels.shape == logits.shape else ""
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} but logits {tuple(logits.shape)} need "
            f"{tuple(logits.shape[:-1])}{several}"
        )


def one_class(term: str, logits: Placed, labels: object = None) -> None:
    """Raise for logits of a single class, whose probability is always 1."""
    if not logits.shape or logits.shape[-1] != 1:
        return
    numbers = isinstance(labels, Tensor) and labels.is_floating_point()
    raise (TypeError if numbers else ValueError)(
        f"the term {term!r} compares probabilities of classes, and logits {tuple(logits.shape)} have one class, "
        f"whose probability is always 1: loss and gradient would always be 0. Instead, {INSTEAD}; "
        "in a recipe write alpha=0 and divergence=kdloss.divergences.logit_mse or bernoulli_kl"
    )


def classes(labels: Tensor, logits: Placed) -> None:
    """Check integer class indices, given for some positions of the logits."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 class indices, got {labels.dtype}; write labels.long()")
    same_place("labels", logits, labels)


# Both lines are for a model that returns a tensor; they say what to change for one that returns an object.
YES_OR_NO = (
    "write kdloss.Task(lambda output, labels: torch.nn.functional.binary_cross_entropy_with_logits(output, "
    "labels.view_as(output).float(), reduction='none').sum(-1)) + kdloss.Logits(kdloss.divergences.bernoulli_kl), with "
    "output.logits in place of output where the model returns an object"
)
INSTEAD = (
    "for numbers to regress write kdloss.Task(lambda output, labels: (output.squeeze(-1) - labels).square()) + "
    f"kdloss.Logits(kdloss.divergences.logit_mse), for a yes or no, one or several, {YES_OR_NO}"
)


def soft_labels(labels: Tensor, logits: Placed) -> None:
    """Check probabilities of every class, at every position of the logits."""
    if labels.shape != logits.shape:
        numbers = labels.shape == logits.shape[:-1]
        raise (TypeError if numbers else ValueError)(
            "a cross-entropy takes class indices in int64 (labels.long(), where they are whole numbers of classes), or "
            f"soft labels: probabilities of the classes, of the logits' shape {tuple(logits.shape)}; got "
            f"{labels.dtype} of shape {tuple(labels.shape)}. Where these are no classes, {INSTEAD}"
        )
    same_place("labels", logits, labels)


_ROUNDED = 0.02
"""How far the sum of probabilities in 16 bits, or written with two digits, may be from 1."""


def probabilities(labels: Tensor, keep: Tensor | None, shift: bool = False) -> None:
    """Check that soft labels are probabilities in every row that counts. This reads the numbers."""
    if not labels.numel():
        return
    low, high = labels.sum(-1).aminmax()  # all rows at first, since most batches are right and this is the fastest
    if low.item() >= 1 - _ROUNDED and high.item() <= 1 + _ROUNDED and labels.min().item() >= -_ROUNDED:
        return
    bad = ~(((labels.sum(-1) - 1).abs() <= _ROUNDED) & (labels >= -_ROUNDED).all(-1))  # True for NaN, too
    if (bad := bad if keep is None else bad & keep).any():
        index = bad.nonzero()[0].tolist()
        row, total = labels[tuple(index)].tolist(), labels[tuple(index)].sum().item()
        index[1:2] = [i + shift for i in index[1:2]]  # with causal=True the first column of the labels was cut off
        raise ValueError(
            f"soft labels are probabilities of the classes, 0 or more and 1 in sum, and labels{index} is "
            f"{[round(x, 4) for x in row[:5]]}{', ...' if len(row) > 5 else ''}, {total:.4g} in sum; write labels / "
            "labels.sum(-1, keepdim=True) for shares in percent, labels.softmax(-1) for logits, mask=... for positions "
            f"without a label. Where each class has its own yes or no, {YES_OR_NO}"
        )


def target_options(smoothing: float, weight: Tensor | None, logits: Placed) -> None:
    """Check the options of a cross-entropy: the label smoothing and the weights of the classes."""
    fraction("smoothing", smoothing)
    if weight is None:
        return
    floating("weight", weight)
    if weight.shape != logits.shape[-1:]:
        raise ValueError(
            f"class weights have shape {tuple(weight.shape)}; logits {tuple(logits.shape)} need one per class"
        )
    same_place("weight", logits, weight)


def finite(name: str, tensor: Tensor, keep: Tensor) -> None:
    """Check for NaN and +inf at positions that count; -inf is a legal logit. This reads the numbers."""
    keep = keep.reshape(*keep.shape, *[1] * (tensor.ndim - keep.ndim))
    bad = (tensor.isnan() | tensor.isposinf()) & keep
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(index)} is {tensor[index].item()} at a position that counts")


def label_range(labels: Tensor, keep: Tensor, classes: int, shift: bool = False) -> None:
    """Check that every label that counts is a class. This reads the numbers."""
    bad = ((labels < 0) | (labels >= classes)) & keep
    if bad.any():
        index = bad.nonzero()[0].tolist()
        value = int(labels[tuple(index)])
        index[-1] += shift  # with causal=True the first column of the labels was cut off
        raise ValueError(
            f"labels{index} is {value}, outside the {classes} classes of the "
            "logits; mark positions to skip with ignore_index"
        )
