"""Identify a teacher by its weights, also if they are offloaded, sharded or quantised."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def fingerprint(teacher: nn.Module) -> str:
    """A SHA-256 of the names, shapes and about 64 values of every parameter, buffer and packed weight.

    Raises: ValueError for weights that can't be read.
    """
    found = hashlib.sha256()
    known = dict(teacher.named_parameters(remove_duplicate=False))  # offloaded tied weights are two tensors
    for name, p in known.items():
        found.update(_digest(name, _values(teacher, name, p)))
    for path, module in teacher.named_modules(remove_duplicate=False):
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, f"{path}." if path else "", True)
        for name, value in own.items():
            for x in tree_leaves(value) if name not in known else ():
                if isinstance(x, Tensor):
                    found.update(_digest(name, _values(teacher, name, x)))
                elif isinstance(x, (str, int, float, torch.dtype)):
                    found.update(f"{name} {x}".encode())
    return found.hexdigest()


def device_of(teacher: nn.Module) -> torch.device:
    """The device for the teacher's inputs: for an offloaded teacher, the device where it computes."""
    for hook in map(_hook, teacher.modules()):
        if getattr(hook, "execution_device", None) is not None:
            place = hook.execution_device
            return torch.device(place) if not isinstance(place, int) else torch.device(_accelerator(), place)
    tensors = (t for kind in (teacher.parameters(), teacher.buffers()) for t in kind)
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def _digest(name: str, x: Tensor) -> bytes:
    if hasattr(x, "full_tensor"):  # sharded over processes
        x = x.full_tensor()
    if is_traceable_wrapper_subclass(x):  # quantised: made of several tensors
        inner, settings = x.__tensor_flatten__()
        return b"".join([f"{name} {settings} ".encode(), *(_digest(n, getattr(x, n)) for n in inner)])
    shape, dtype = tuple(x.shape), x.dtype
    values = (x.detach().dequantize() if x.is_quantized else x.detach()).flatten()
    some = values[:: max(1, values.numel() // 64)].cpu().contiguous().view(torch.uint8)
    return f"{name} {shape} {dtype} ".encode() + bytes(some.tolist())


def _values(teacher: nn.Module, name: str, x: Tensor) -> Tensor:
    """A tensor with its values; those that accelerate offloads are read from where it keeps them between passes."""
    if not x.is_meta:
        return x
    path, _, last = name.rpartition(".")
    for hook in _each(_hook(teacher.get_submodule(path))):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            found: Tensor = kept[last]
            return found
    raise ValueError(
        f"the teacher's {name!r} is on the device 'meta' and nothing says where its values are: load the weights, or "
        "offload them by accelerate (device_map=...)"
    )


def _hook(module: nn.Module) -> Any:
    return getattr(module, "_hf_hook", None)


def _each(hook: Any) -> Iterator[Any]:
    """The hooks inside an accelerate hook, or the hook itself."""
    yield from getattr(hook, "hooks", (hook,))


def _accelerator() -> str:
    known = getattr(torch, "accelerator", None)  # from torch 2.6
    return str(known.current_accelerator().type) if known is not None and known.is_available() else "cuda"
