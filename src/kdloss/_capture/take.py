"""Select the tensor of a module's output to capture."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from kdloss.layers.names import split_name

Key = int | str
Take = Key | tuple[Key, ...] | Callable[[Any], Any] | None


def taken(name: Key, output: Any, take: Take = None) -> Tensor:
    """The tensor of `output` at an index, a key or a path of these, or the result of a function; by default the first.

    If `name` has brackets, as "fpn[0]", `take` applies to that part of the output.

    >>> import torch
    >>> taken("attn", (None, {"values": torch.ones(2)}), (1, "values"))
    tensor([1., 1.])
    """
    module, path = split_name(name) if isinstance(name, str) else (name, ())
    if take is None and not path and isinstance(output, Tensor):
        return output
    if path and (inside := follow(output, path)) is None:
        raise TypeError(f"{module!r} returned {described(output)}, which has no part {name!r}")
    output = inside if path else output
    found = take(output) if callable(take) else _first(name, output) if take is None else follow(output, take)
    if isinstance(found, Tensor):
        return found
    if isinstance(found, PackedSequence) or (take is None and _packed(output)):
        raise TypeError(
            f"{_called(name)} returned a PackedSequence, whose rows mix positions of several examples; write "
            "take=lambda output: torch.nn.utils.rnn.pad_packed_sequence(output[0], batch_first=True)[0] (or "
            "output in place of output[0], if it is the packed sequence itself), and feature_mask=... for the padding"
        )
    if several := levels(found):
        raise TypeError(
            f"take={take!r} finds {described(found)} in what {_called(name)} returned, which is several features; "
            f"{_each(name, several)}"
        )
    asked = "holds no tensor" if take is None else f"take={take!r} finds no tensor there"
    raise TypeError(
        f"{_called(name)} returned {described(output)}; {asked}. Write take=1 (an index), take='hidden' (a key), "
        "take=(1, 'hidden') (one inside the other) or a function of the output"
    )


def described(output: Any) -> str:
    """Describe the contents of an output, for error messages.

    >>> described((None, {"hidden": Tensor()}))
    "a tuple of [None, a dict of {'hidden': a Tensor of shape (0,)}]"
    """
    kind = f"a {type(output).__name__}"
    if output is None:
        return "None"
    if isinstance(output, Tensor):
        return f"{kind} of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{kind} of {{{', '.join(f'{key!r}: {described(part)}' for key, part in output.items())}}}"
    if isinstance(output, (tuple, list)):
        return f"{kind} of [{', '.join(map(described, output))}]"
    return f"{kind} with {list(vars(output))}" if hasattr(output, "__dict__") else kind


def levels(output: Any) -> list[Key]:
    """The indices or keys of several features in a list, a dict or a tuple of maps, where none is the obvious one.

    It is empty for outputs that begin with hidden states and go on with other tensors, as a block's tuple or a
    Hugging Face output.

    >>> import torch
    >>> levels([torch.ones(2, 3, 8, 8), torch.ones(2, 3, 4, 4)]), levels((torch.ones(2, 5, 8), torch.ones(2, 5, 5)))
    ([0, 1], [])
    """
    if isinstance(output, Mapping):
        items = [] if is_dataclass(output) else list(output.items())
    else:
        items = list(enumerate(output)) if isinstance(output, (list, tuple)) else []
    features = [(k, x) for k, x in items if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2]
    if isinstance(output, tuple):
        features = [(k, x) for k, x in features if x.ndim > 3 and x.ndim == features[0][1].ndim]
    return [k for k, _ in features] if len(features) > 1 else []


def _each(name: Key, several: list[Key]) -> str:
    names = ", ".join(repr(f"{name}[{key}]") for key in several)
    return f"name its parts as layers, {names}, or choose one with take=..."


def _packed(output: Any) -> bool:
    return isinstance(output, tuple) and any(isinstance(x, PackedSequence) for x in (output, *output[:1]))


def _first(name: Key, output: Any) -> Any:
    if several := levels(output):
        raise TypeError(
            f"{_called(name)} returned {described(output)}: several features, and it is not clear which one to take; "
            f"{_each(name, several)}"
        )
    if _packed(output):
        return None
    values = output.values() if isinstance(output, Mapping) else output
    values = (values,) if isinstance(values, Tensor) or not hasattr(values, "__iter__") else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def follow(output: Any, path: Key | tuple[Key, ...]) -> Any:
    """The value at an index, a key or a path of these; None if there is none."""
    for key in path if isinstance(path, tuple) else (path,):
        if isinstance(output, Tensor):
            return None  # an index would choose an example of the batch
        try:
            output = output[key]
        except (KeyError, IndexError, TypeError):
            numbered = isinstance(output, Mapping) and not isinstance(key, str)  # torchvision's FPN has keys "0", "1"
            output = output.get(str(key)) if numbered else getattr(output, key, None) if isinstance(key, str) else None
    return output


def _called(name: Any) -> str:
    return f"block {name}" if isinstance(name, int) else repr(name)
