"""Which tensor of a module's output counts."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Key = int | str
Take = Key | tuple[Key, ...] | Callable[[Any], Any] | None


def taken(name: Key, output: Any, take: Take = None) -> Tensor:
    """The tensor at an index, a key or a path of these, or what a function gives; else the first.

    >>> import torch
    >>> taken("attn", (None, {"values": torch.ones(2)}), (1, "values"))
    tensor([1., 1.])
    """
    found = take(output) if callable(take) else _first(output) if take is None else follow(output, take)
    if isinstance(found, Tensor):
        return found
    asked = "holds no tensor" if take is None else f"take={take!r} finds no tensor there"
    raise TypeError(
        f"{name!r} returned {described(output)}; {asked}. Write take=1 (an index), take='hidden' (a key), "
        "take=(1, 'hidden') (one inside the other) or a function of the output"
    )


def described(output: Any) -> str:
    """What an output holds.

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


def _first(output: Any) -> Any:
    parts = output.values() if isinstance(output, Mapping) else output
    parts = (parts,) if isinstance(parts, Tensor) or not hasattr(parts, "__iter__") else parts
    return next((part for part in parts if isinstance(part, Tensor)), None)


def follow(output: Any, path: Key | tuple[Key, ...]) -> Any:
    """What stands at an index, a key or a path of these; None where nothing does."""
    for key in path if isinstance(path, tuple) else (path,):
        if isinstance(output, Tensor):
            return None  # an index would choose an example of the batch
        try:
            output = output[key]
        except (KeyError, IndexError, TypeError):
            output = getattr(output, key, None) if isinstance(key, str) else None
    return output
