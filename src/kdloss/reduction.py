"""The contract every loss shares: which positions count, and how their values become one number."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from kdloss import _checks

Reduction = Literal["mean", "sum", "none"]


def precise(x: Tensor) -> Tensor:
    """16-bit inputs are computed in float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Several to be computed with each other: in float64 if one of them is, else in float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def widest(device: torch.device) -> torch.dtype:
    """The dtype with the most digits that a device has: float64, but on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_cpu(device: torch.device) -> bool:
    """Whether looking at numbers on a device waits for nothing."""
    return device.type == "cpu"


def fill(x: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."] | None) -> Shaped[Tensor, "..."]:
    """Zeros where `mask` is False, so that nothing there, NaN included, reaches value or gradient."""
    if mask is None:
        return x
    out = ~mask.reshape((*mask.shape, *[1] * (x.ndim - mask.ndim)))
    if x.ndim > 2 and not x.is_contiguous() and x.movedim(-1, 1).is_contiguous():  # a map, which stays as it lies
        return x.movedim(-1, 1).masked_fill(out.movedim(-1, 1), 0).movedim(1, -1)
    return x.masked_fill(out, 0)


def reduce(
    values: Tensor,
    mask: Bool[Tensor, "..."] | None = None,
    *,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    r"""Reduce one value per position to a loss, over the positions that count.

    $\text{mean} = \frac{1}{N}\sum_{i:\,m_i} v_i$ with N the number of positions where the mask is
    True, or `num_items_in_batch` where given: the size of the whole batch of which this is a
    micro-batch, so that micro-batches add up to exactly the loss and gradient of one batch.

    Shapes: values `[...]`, mask `[...]` (True = keep). Returns a scalar, or `[...]` for "none".
    Nothing to count gives 0, which backpropagates zeros; so does a `num_items_in_batch` that is a tensor 0.

    Raises: ValueError for an unknown reduction, a mask of another shape, or a `num_items_in_batch`
    that is not positive or comes with "sum" or "none"; TypeError for a mask that is not boolean.

    >>> values = torch.tensor([1.0, 3.0, float("nan")])
    >>> reduce(values, torch.tensor([True, True, False]))
    tensor(2.)
    """
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if mask is not None:
        _checks.mask(mask, values.shape, "values")
        values = fill(values, mask)
    if reduction == "none":
        denominator(1, reduction, num_items_in_batch)
        return values
    count = max(values.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return divided(values.sum(), denominator(count, reduction, num_items_in_batch))


def denominator(count: int | Tensor, reduction: Reduction, num_items_in_batch: int | Tensor | None) -> int | Tensor:
    """What the sum over the positions that count is divided by."""
    if num_items_in_batch is None:
        return count if reduction == "mean" else 1
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch divides the sum of reduction='mean', got reduction={reduction!r}")
    if not isinstance(num_items_in_batch, Tensor) and num_items_in_batch <= 0:
        raise ValueError(f"num_items_in_batch must be positive, got {num_items_in_batch}")
    return num_items_in_batch


def divided(total: Tensor, count: int | Tensor) -> Tensor:
    """The total by the count, and 0 where that is 0: of nothing, in the whole batch, there is no loss."""
    if not isinstance(count, Tensor):
        return total / count
    none = count == 0
    mean = total / count.masked_fill(none, 1)
    return mean.masked_fill(none.to(mean.device, non_blocking=True), 0)


def masked(
    loss: Callable[..., Tensor],
    student: Any,
    teacher: Any,
    mask: Bool[Tensor, "..."] | None = None,
    *,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Evaluate any per-position loss under the shared contract.

    Positions where `mask` is False are zeroed before the loss and dropped after it: what stands
    there (NaN and inf too) touches neither value nor gradient, and its gradient is exactly 0. A loss
    with a parameter called `mask` compares positions with each other, and is told which count.

    Shapes: student and teacher `[..., D]` (or any kind of logits) with mask `[...]`. `reduction` and
    `num_items_in_batch` are those of `reduce`.

    >>> import kdloss
    >>> student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    >>> student[1] = float("nan")
    >>> masked(kdloss.divergences.forward_kl, student, teacher, torch.tensor([True, False]))
    tensor(0.)
    """
    if mask is None:
        return reduce(loss(student, teacher), reduction=reduction, num_items_in_batch=num_items_in_batch)
    _checks.mask(mask, student.shape[: mask.ndim], "the leading dimensions of the student")
    student, teacher = (
        fill(x, mask) if isinstance(x, Tensor) else x.at(lambda t: fill(t, mask)) for x in (student, teacher)
    )
    values = told(loss, student, teacher, mask)
    return reduce(values, mask, reduction=reduction, num_items_in_batch=num_items_in_batch)


def told(loss: Callable[..., Tensor], student: Any, teacher: Any, mask: Tensor | None, **more: Any) -> Tensor:
    """A loss's values; one with a parameter `mask` is told which positions count, one with `**kwargs` passes it on.

    Raises: TypeError where it passes it to one that takes none: only that one knows whether it wants it.
    """
    if takes(loss, "mask"):
        return loss(student, teacher, mask=mask, **more)
    if mask is None or not passes_on(loss):
        return loss(student, teacher, **more)
    try:
        return loss(student, teacher, mask=mask, **more)
    except TypeError as error:
        if "unexpected keyword argument 'mask'" not in str(error):
            raise
        name = getattr(loss, "__name__", repr(loss))
        raise TypeError(
            f"{name} takes **kwargs, so it is given mask=, which positions count, to pass on, and {error}. Write "
            f"@functools.wraps(function) over it, or name its parameters instead of **kwargs: def {name}(student, "
            "teacher)"
        ) from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a loss wants something by this name, beside student and teacher."""
    while True:  # what is bound in a partial is a parameter still
        inner = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
        if inner is None:
            return _named(function, name)
        function = inner


def _named(function: Callable[..., Any], name: str) -> bool:
    return name in parameters(function)


# Whether torch.compile traces the making of modules; then it takes signatures, which it can't trace, as they are.
TRACES_MODULES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
if TRACES_MODULES:  # what torch.compiler.assume_constant_result does, which would import the compiler
    _named._dynamo_marked_constant = True  # type: ignore[attr-defined]


def passes_on(function: Callable[..., Any]) -> bool:
    """Whether a function takes `**kwargs`, which may be another one's."""
    return takes(function, "**")


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters, `**kwargs` as "**"; none where they can't be told. Looked up once."""
    if torch.compiler.is_compiling():
        return _parameters(function)
    try:
        if function not in _known:
            _known[function] = _parameters(function)
        return _known[function]
    except TypeError:  # nothing that can be a key
        return _parameters(function)


_known: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {"**" if p.kind is p.VAR_KEYWORD else name: p for name, p in known.items()}


def per_example(values: Tensor, mask: Bool[Tensor, "..."] | None) -> Tensor:
    """Mean over everything behind the first dimension: values `[B, ...]` to `[B]`."""
    shape = values.shape[0], values.shape[1:].numel()
    values = fill(values, mask).reshape(shape)
    if mask is None:
        return values.sum(1) / max(shape[1], 1)
    return values.sum(1) / mask.reshape(shape).sum(1).clamp_min(1)
