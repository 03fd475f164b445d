"""Find, on CPU tensors, operations that would make the host wait for an accelerator."""

import contextlib
import sys

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

WAITING = {  # operators whose result is a Python number, or has a shape that depends on the data
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "allclose",
    "masked_select",
    "masked_scatter_backward",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "multinomial",
    "_linalg_check_errors",
}
READING = {"tolist", "numpy", "__array__", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"}
# Functions that copy from the host, and the index of the argument that they copy.
MADE_BY_THE_HOST = {"tensor": 0, "as_tensor": 0, "asarray": 0, "new_tensor": 1}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}


class Waited(AssertionError):
    """The host would have waited for the accelerator."""


class _Operators(TorchDispatchMode):
    """Checks the arguments of operators, also in backward. Compiled functions run uncompiled inside it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise Waited(f"{func} waits for its result")
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
            by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            fills = len(args) > 2 and args[2].numel() == 1  # PyTorch runs this as masked_fill
            if by_mask and not fills:
                raise Waited(f"{func} by a mask: how many there are has to be known; fill, or index by numbers")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waited(f"{func} by a tensor without output_size")
        if name in ("_to_copy", "copy_"):
            _not_between_devices(func, args, kwargs)
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """Checks what operators on CPU tensors do not show: numbers copied from and to Python, except by `from_numpy`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        made_of = args[MADE_BY_THE_HOST.get(name, 0) :][:1]
        if name in MADE_BY_THE_HOST and not (made_of and isinstance(made_of[0], Tensor)):
            raise Waited(f"{name} copies from the host; torch.full fills on the device")
        if name in READING and args and isinstance(args[0], Tensor):
            raise Waited(f"Tensor.{name} reads on the host")
        if func in INDEXING and any(isinstance(x, (list, np.ndarray)) for x in _parts(args[1])):
            raise Waited("an index that is a list is copied from the host")
        return func(*args, **kwargs)


def _parts(index):
    return index if isinstance(index, tuple) else (index,)


def _not_between_devices(func, args, kwargs):
    source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
    target = args[0].device if source is not args[0] else torch.device(kwargs.get("device") or source.device)
    waits = not (kwargs.get("non_blocking") or any(x is True for x in args[2:]))
    if source.device.type != target.type and waits:
        raise Waited(f"{func} from {source.device} to {target} waits; write non_blocking=True, from pinned memory")


@contextlib.contextmanager
def never_waiting():
    """Raise `Waited` for every operation inside the `with` that would wait for an accelerator."""
    with _Operators(), _Calls():
        yield


def as_on_an_accelerator(patch):
    """Make kdloss treat CPU tensors like an accelerator's: every `on_cpu` in it returns False."""
    for module in [m for name, m in sys.modules.items() if name.startswith("kdloss") and hasattr(m, "on_cpu")]:
        patch.setattr(module, "on_cpu", lambda device: False)
    patch.setattr(torch.cpu, "Event", _Event, raising=False)  # older torch has no such class
    may_wait(patch, "kdloss.terms._ahead.landed")


class _Event:
    """An event of a device whose work is always finished."""

    def record(self, stream):
        pass

    def synchronize(self):
        pass


def may_wait(patch, target):
    """Allow one function, by its dotted name, to read numbers on the host."""
    place, _, name = target.rpartition(".")
    function = getattr(sys.modules[place], name)

    def unwatched(*args, **kwargs):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    patch.setattr(target, unwatched)
