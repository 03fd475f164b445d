"""`capture` and the `record` behind it: hooks that exist only inside a `with`."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DistributedDataParallel

from kdloss._capture.compiled import hooks_seen
from kdloss._capture.located import Located, find
from kdloss._capture.recorder import Captured, Recorder, Request, Stop, Which, known_at_the_end
from kdloss._capture.take import Take
from kdloss._layout import Evident
from kdloss.layers.layer_map import Name
from kdloss.layers.names import modules_of

Option = TypeVar("Option")
Key = TypeVar("Key", bound=Hashable)


@contextmanager
def capture(
    model: nn.Module,
    names: Iterable[Name],
    *,
    blocks: str | None = None,
    stop: bool = False,
    which: Which | Mapping[Name, Which] = "once",
    take: Take | Mapping[Name, Take] = None,
) -> Iterator[Captured]:
    """Record the outputs of chosen modules of a `model` during one forward pass inside the `with`.

    `names` are module names, or integers for the model's blocks (in the list that `blocks` names, else in the one
    that `kdloss.layers.find_blocks` finds). Prefixes of DDP, torch.compile and peft may be left out. A name may select
    a part of the module's output in brackets, by index ("fpn[0]") or key ("backbone[out]"), also nested.

    - `take` selects a tensor of the output: an index, a key, a path like `(1, "values")`, or a function of the output.
      By default it is the output itself or its first tensor; a list or dict of several features has no default and
      raises. `take=torch.clone` copies a feature that the model changes in place later, like the input of a
      `ReLU(inplace=True)`.
    - `which` selects one run of a module that runs several times: "first", "last", "all" (gives a list), or the index
      of a run, where negative ones count from the end. By default several runs are an error.
    - `take` and `which` may also be mappings with entries for some of the names.
    - `stop=True` ends the forward pass as soon as everything is captured. The rest of the `with` block is skipped.

    The hooks are removed when the `with` ends, also after an exception; after an exception the features are dropped
    too. Only the thread that opened the `with` is recorded. What activation checkpointing recomputes in `backward()` is
    not recorded. If you copy the model inside the `with`, the hooks of the copy do nothing. A model that was compiled
    as a whole runs eagerly inside the `with`; compiled blocks stay compiled. Under `inference_mode` the features are
    copies, because inference tensors can't enter a loss.

    Raises: ValueError for a name that does not exist or options that don't fit; RuntimeError if a module did not run or
    ran more than once, if its output was changed in place later, or if it returned a tensor without gradient although
    its parameters are trained (it ran under `torch.no_grad()` or in reentrant checkpointing); TypeError if `take` finds
    no tensor, and for TorchScript.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> with capture(model, ["0"]) as seen:
    ...     out = model(torch.ones(1, 2))
    >>> seen["0"].shape, seen.output is out
    (torch.Size([1, 3]), True)
    """
    each = list(dict.fromkeys(names))
    once: Which = "once"
    whichs, takes = _per_name("which", each, which, once), _per_name("take", each, take, None)
    with record(model, {name: Request(name, blocks, whichs[name], takes[name]) for name in each}, stop=stop) as seen:
        yield seen


@contextmanager
def record(
    model: nn.Module,
    requests: Mapping[Key, Request],
    *,
    stop: bool = False,
    located: Located | None = None,
    given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
) -> Iterator[Captured]:
    """`capture` with arbitrary keys: several requests may ask for different things of one module in the same pass.

    Keep `located` from step to step to avoid looking up the modules again. `given` are the positional and keyword
    inputs of the pass; a caller that passes them keeps the model's output itself, and the model needs no hooks.
    """
    if requests:
        _refuse_torchscript(model)
    asked: dict[nn.Module, list[Hashable]] = {}
    for key, request in requests.items():
        name, blocks = request.name, request.blocks
        module = find(model, name, blocks) if located is None else located.find(model, name, blocks)
        _refuse_torchscript(module)
        if located is not None:
            located.refuse_dropped(model, module, name, blocks)
        if request.which != "once":
            _check(request, stop)
        asked.setdefault(module, []).append(key)
    every, evident = modules_of(model), Evident() if located is None else located.evident
    evident.meet(model, every)
    recorder = Recorder(model, asked, requests, stop, evident)
    seen = recorder.captured
    hook = _hook()
    handles = [m.register_forward_hook(hook(partial(recorder.record, m))) for m in asked]
    if given is not None:
        recorder.begin(model, *given)
    elif not isinstance(model, ScriptModule):
        handles.append(model.register_forward_pre_hook(hook(recorder.begin), with_kwargs=True))
        handles.append(model.register_forward_hook(hook(recorder.finish)))
    try:
        try:
            with hooks_seen(every, asked):
                yield seen
        except Stop as signal:
            if signal.recorder is not recorder:
                raise
            _resharded(every)
        recorder.check()
        if recorder.stopped:
            _refuse_unsynchronised(model, seen)
    except BaseException:
        seen.empty()
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    """A hook whose copies and pickles do nothing, even where `kdloss` isn't installed."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> None:
        self.run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


@cache
def _hook() -> type[_Hook]:
    """A `_Hook` that `torch.compile` never traces. Made on first use, because it imports the compiler."""
    untraced: Callable[[Callable[..., None]], Callable[..., None]] = torch.compiler.disable
    return type("_Hook", (_Hook,), {"__call__": untraced(_Hook.__call__)})


def _refuse_torchscript(module: nn.Module) -> None:
    """Raise for TorchScript, which ignores hooks."""
    if isinstance(module, ScriptModule):
        raise TypeError(
            f"features are captured by hooks, and TorchScript ({type(module).__name__}) has none: its outputs can be "
            "learned. Load the model it was made from; or, where it returns features too, wrap it in a module of your "
            "own that passes them through an nn.Identity, and capture that"
        )


def _check(request: Request, stop: bool) -> None:
    which, name = request.which, request.name
    if not isinstance(which, int) and which not in ("once", "first", "last", "all"):
        raise ValueError(f"which={which!r} for {name!r} is unknown; choose 'once', 'first', 'last', 'all' or a number")
    if stop and known_at_the_end(which):
        raise ValueError(
            f"which={which!r} for {name!r} is known at the end of the pass only, and stop=True ends it "
            "before; write which='first' or the number of one, or stop=False"
        )


def _per_name(
    option: str, names: list[Name], given: Option | Mapping[Name, Option], default: Option
) -> dict[Name, Option]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{option} has {unknown}, which are not among the names to capture, {names}")
    return {name: given.get(name, default) for name in names}


def _resharded(modules: Iterable[nn.Module]) -> None:
    """Reshard a model under FSDP2: a pass that ends early leaves its parameters gathered. Needs a torch that can."""
    sharded: Any = next((m for m in modules if hasattr(type(m), "reset_iter_state")), None)
    if sharded is not None:
        sharded.reset_iter_state()


def _refuse_unsynchronised(model: nn.Module, seen: Captured) -> None:
    """Raise for a trained DDP model: it prepares the backward pass after its forward, which was cut off."""
    if not any(t.requires_grad for t in seen.features.values()):
        return
    if any(isinstance(m, DistributedDataParallel) and m.require_backward_grad_sync for m in modules_of(model)):
        raise RuntimeError(
            "stop=True ends the pass before DistributedDataParallel prepares to synchronise gradients, and these "
            "features need gradients; write stop=False for a model that is trained, or torch.no_grad() around one "
            "that isn't"
        )
