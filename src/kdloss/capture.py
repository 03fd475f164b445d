"""Names in, outputs out: what chosen modules return during one forward pass."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdloss.layers import Name, find_blocks, resolve


class Captured(Mapping[Name, Tensor]):
    """The features of one forward pass, by the names asked for, and the model's own output."""

    def __init__(self) -> None:
        self.features: dict[Name, Tensor] = {}
        self.output: Any = None

    def __getitem__(self, name: Name) -> Tensor:
        if name not in self.features:
            raise KeyError(f"{name!r} was not captured; there is {list(self.features)}")
        return self.features[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.features)


Hook = Callable[[nn.Module, Any, Any], None]


@contextmanager
def capture(
    model: nn.Module, names: Iterable[Name], *, blocks: str | None = None, stop: bool = False
) -> Iterator[Captured]:
    """Record the outputs of chosen modules during the one forward pass made inside the `with`.

    `names` are module names, or integers for a model's blocks (found by themselves, or in the list
    that `blocks` names). Prefixes of DDP, torch.compile and peft may be left out. Where a module
    returns a tuple, a dict or a model output, its first tensor counts. With `stop=True` the pass
    ends at the last captured module, and what follows it inside the `with` is skipped.

    The hooks are gone when the `with` ends, after an exception too. End it before `backward()`:
    activation checkpointing runs modules again there. Only the thread that opened it is recorded.

    Raises: ValueError for a name that does not exist; RuntimeError when a module ran not at all or
    more than once, changed its output in place afterwards, or gave a tensor without gradient
    although its parameters are trained (reentrant checkpointing); TypeError for an output that
    holds no tensor.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> with capture(model, ["0"]) as seen:
    ...     out = model(torch.ones(1, 2))
    >>> seen["0"].shape, seen.output is out
    (torch.Size([1, 3]), True)
    """
    asked: dict[nn.Module, list[Name]] = {}
    for name in names:
        asked.setdefault(_module(model, name, blocks), []).append(name)
    recorder = _Recorder(asked, stop)
    # Hooks on a compiled block run beside it, they are not traced into it.
    eager: Callable[[Hook], Hook] = torch.compiler.disable
    handles = [m.register_forward_hook(eager(partial(recorder.record, m))) for m in asked]
    handles.append(model.register_forward_hook(eager(recorder.finish)))
    try:
        yield recorder.captured
    except _Stop as signal:
        if signal.recorder is not recorder:
            raise
    finally:
        for handle in handles:
            handle.remove()
    recorder.check()


class _Stop(Exception):
    """Ends a forward pass whose remaining modules nobody needs."""

    def __init__(self, recorder: "_Recorder") -> None:
        self.recorder = recorder


class _Recorder:
    """The state behind one `capture`."""

    def __init__(self, asked: Mapping[nn.Module, list[Name]], stop: bool) -> None:
        self.asked, self.stop = asked, stop
        self.captured = Captured()
        self.versions: dict[nn.Module, int] = {}
        self.grad = torch.is_grad_enabled()
        self.thread = threading.get_ident()

    def record(self, module: nn.Module, _module: nn.Module, args: object, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        names = self.asked[module]
        if module in self.versions:
            raise RuntimeError(
                f"{names} ran more than once inside the `with`; make one forward pass in it, end it "
                "before backward(), and capture modules that are used once"
            )
        tensor = _first_tensor(names, output)
        trained = self.grad and any(p.requires_grad for p in module.parameters())
        if trained and not tensor.requires_grad:
            raise RuntimeError(
                f"{names} gave a tensor without gradient although it is trained: reentrant activation "
                "checkpointing hides it. Write use_reentrant=False where checkpointing is turned on"
            )
        self.versions[module] = _version(tensor)
        self.captured.features.update(dict.fromkeys(names, tensor))
        if self.stop and len(self.versions) == len(self.asked):
            raise _Stop(self)

    def finish(self, model: nn.Module, args: object, output: Any) -> None:
        if threading.get_ident() == self.thread:
            self.captured.output = output

    def check(self) -> None:
        missing = [names for module, names in self.asked.items() if module not in self.versions]
        if missing:
            raise RuntimeError(
                f"{missing} did not run inside the `with`: the model skips it, was not called, or was "
                "compiled by torch.compile before the hook was there; compile its blocks instead: "
                "for block in kdloss.find_blocks(model): block.compile()"
            )
        for module, version in self.versions.items():
            names = self.asked[module]
            if _version(self.captured[names[0]]) != version:
                raise RuntimeError(
                    f"the output of {names} was changed in place after it was captured, as by "
                    "ReLU(inplace=True); write inplace=False, or capture the module that changes it"
                )


def _module(model: nn.Module, name: Name, blocks: str | None) -> nn.Module:
    if isinstance(name, str):
        return resolve(model, name)
    found = find_blocks(model, blocks)
    if not -len(found) <= name < len(found):
        raise ValueError(f"block {name} does not exist: {len(found)} blocks, 0 to {len(found) - 1}")
    return found[name]


def _first_tensor(names: list[Name], output: Any) -> Tensor:
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(parts, Tensor):
        return parts
    tensor = next((p for p in parts or () if isinstance(p, Tensor)), None)
    if tensor is None:
        raise TypeError(f"{names} returned {type(output).__name__}, which holds no tensor")
    return tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
