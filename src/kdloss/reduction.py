"""The contract of every loss: which positions count, and how their values are reduced to one number."""

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
    """16-bit tensors as float32; float32 and float64 tensors as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in one dtype, to be computed together: float64 if one of them is, otherwise float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def savable(x: Tensor) -> Tensor:
    """A tensor that autograd can save for a backward pass: one made in inference mode is copied."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():  # not traced
        return x
    return x.clone()


def widest(device: torch.device) -> torch.dtype:
    """The dtype with the most digits on a device: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_cpu(device: torch.device) -> bool:
    """Whether numbers on this device can be read without a synchronisation."""
    return device.type == "cpu"


def fill(x: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."] | None) -> Shaped[Tensor, "..."]:
    """Put zeros where `mask` is False, so that nothing there, not even NaN, reaches value or gradient."""
    if mask is None:
        return x
    out = ~mask.reshape((*mask.shape, *[1] * (x.ndim - mask.ndim)))
    if x.ndim > 2 and not x.is_contiguous() and x.movedim(-1, 1).is_contiguous():  # a map: keep its memory layout
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
    True. If you pass `num_items_in_batch`, it replaces N: pass the number of positions in the full batch, and the
    micro-batches add up to exactly the loss and gradient of one batch.

    Shapes: values `[...]`, mask `[...]` (True = keep). Returns a scalar, or `[...]` for "none".
    If no position counts, or `num_items_in_batch` is a tensor 0, the loss is 0 and backpropagates zeros.

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
    """The number by which the sum over the positions that count is divided."""
    if num_items_in_batch is None:
        return count if reduction == "mean" else 1
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch divides the sum of reduction='mean', got reduction={reduction!r}")
    if not isinstance(num_items_in_batch, Tensor) and num_items_in_batch <= 0:
        raise ValueError(f"num_items_in_batch must be positive, got {num_items_in_batch}")
    return num_items_in_batch


def divided(total: Tensor, count: int | Tensor) -> Tensor:
    """The total divided by the count, or 0 where the count is 0: an empty batch has no loss."""
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

    Positions where `mask` is False are zeroed before the loss and dropped after it. Whatever is there (NaN and inf,
    too) affects neither value nor gradient, and its gradient is exactly 0. A loss with a parameter called `mask`
    compares positions with each other, and gets the mask.

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
    student, teacher = (_filled(x, mask) for x in (student, teacher))
    values = with_mask(loss, student, teacher, mask)
    return reduce(values, mask, reduction=reduction, num_items_in_batch=num_items_in_batch)


def _filled(x: Any, mask: Tensor) -> Any:
    """A tensor or logits of another kind, with zeros (a top-k teacher: with no class) where `mask` is False."""
    if isinstance(x, Tensor):
        return fill(x, mask)
    only = getattr(x, "only", None)
    return x.at(lambda t: fill(t, mask)) if only is None else only(mask)


def with_mask(loss: Callable[..., Tensor], student: Any, teacher: Any, mask: Tensor | None, **more: Any) -> Tensor:
    """Call a loss, with the mask if it has a parameter `mask`, or `**kwargs`, through which it may pass it on.

    Raises: TypeError where a loss with `**kwargs` passes the mask on to a function that doesn't take it.
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
            f"{name} takes **kwargs, so it gets mask= (the positions that count) to pass on, and {error}. Write "
            f"@functools.wraps(function) over it, or name its parameters instead of **kwargs: def {name}(student, "
            "teacher)"
        ) from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, also inside partials and wrappers."""
    while True:  # a partial's bound arguments are parameters, too
        inner = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
        if inner is None:
            return _named(function, name)
        function = inner


def _named(function: Callable[..., Any], name: str) -> bool:
    return name in parameters(function)


# Whether torch.compile traces the construction of modules. It can't trace signatures then, and takes them as constant.
TRACES_MODULES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
if TRACES_MODULES:  # as torch.compiler.assume_constant_result does, which would import the compiler
    _named._dynamo_marked_constant = True  # type: ignore[attr-defined]


def passes_on(function: Callable[..., Any]) -> bool:
    """Whether a function takes `**kwargs`, which it may pass on to another function."""
    return takes(function, "**")


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters, with `**kwargs` as "**"; none where Python can't say. Cached."""
    if torch.compiler.is_compiling():
        return _parameters(function)
    try:
        if function not in _known:
            _known[function] = _parameters(function)
        return _known[function]
    except TypeError:  # it can't be a key
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
    """The mean over all dimensions but the first: values `[B, ...]` to `[B]`."""
    shape = values.shape[0], values.shape[1:].numel()
    values = fill(values, mask).reshape(shape)
    if mask is None:
        return values.sum(1) / max(shape[1], 1)
    return values.sum(1) / mask.reshape(shape).sum(1).clamp_min(1)
