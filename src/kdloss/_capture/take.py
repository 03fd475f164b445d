"""Which tensor of a module's output counts."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from kdloss.layers.names import split_name

Key = int | str
Take = Key | tuple[Key, ...] | Callable[[Any], Any] | None


def taken(name: Key, output: Any, take: Take = None) -> Tensor:
    """The tensor at an index, a key or a path of these, or what a function gives; else the first.

    Of a name in brackets, "fpn[0]", `output` is that part of what the module returned.

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
            f"{_called(name)} returned a PackedSequence, whose rows are positions of several examples by turns; write "
            "take=lambda output: torch.nn.utils.rnn.pad_packed_sequence(output[0], batch_first=True)[0], of a packed "
            "sequence by itself without the [0], and feature_mask=... for what is padding then"
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


def levels(output: Any) -> list[Key]:
    """Where several features stand in a list or dict, or in a tuple of maps, of which none is the first by right.

    What begins with hidden states, as a block's tuple or a Hugging Face output, goes on with other things.

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
    parts = ", ".join(repr(f"{name}[{key}]") for key in several)
    return f"name its parts as layers, {parts}, or say by take=... which one counts"


def _packed(output: Any) -> bool:
    return isinstance(output, tuple) and any(isinstance(x, PackedSequence) for x in (output, *output[:1]))


def _first(name: Key, output: Any) -> Any:
    if several := levels(output):
        raise TypeError(
            f"{_called(name)} returned {described(output)}: several features, of which none is the first by right; "
            f"{_each(name, several)}"
        )
    if _packed(output):
        return None
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
            numbered = isinstance(output, Mapping) and not isinstance(key, str)  # torchvision's FPN has keys "0", "1"
            output = output.get(str(key)) if numbered else getattr(output, key, None) if isinstance(key, str) else None
    return output


def _called(name: Any) -> str:
    return f"block {name}" if isinstance(name, int) else repr(name)
