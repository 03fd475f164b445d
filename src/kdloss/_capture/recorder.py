"""The state of one `capture`: what ran, what is kept, and what went wrong."""

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdloss._capture.take import Take, levels, taken
from kdloss._capture.why import no_gradient, not_run
from kdloss._layout import NOTHING, Evident, Tells, ends
from kdloss.layers.blocks import width
from kdloss.layers.layer_map import Name
from kdloss.layers.names import unwrap

Which = Literal["once", "first", "last", "all"] | int
_NUMBERS = {"once": 0, "first": 0, "last": -1}


@dataclass(frozen=True)
class Request:
    """What to record of one module; the fields are options of `capture`.

    `shape_alone` keeps the shape of a feature without its data: no memory is held, and later changes in place don't
    matter.
    """

    name: Name
    blocks: str | None = None
    which: Which = "once"
    take: Take = None
    shape_alone: bool = False


class Captured(Mapping[Any, Any]):
    """The features of one forward pass, by the requested names, and the model's own output as `output`."""

    def __init__(self) -> None:
        self.features: dict[Hashable, Any] = {}
        self.output: Any = None
        self.classes: Any = None  # names of the student's and this teacher's classes, if they have names
        self.views: dict[str, Captured] = {}
        self.tells: dict[Hashable, Tells] = {}
        self.head = NOTHING

    def of(self, term: str) -> "Captured":
        """What was captured for one term of a sum, if the terms requested different things."""
        return self.views.get(term, self)

    def __getitem__(self, name: Hashable) -> Any:
        if name not in self.features:
            raise KeyError(f"{name!r} was not captured; there is {list(self.features)}")
        return self.features[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.features)

    def empty(self) -> None:
        """Release everything."""
        self.features.clear()
        self.views.clear()
        self.tells.clear()
        self.output = None


class Stop(BaseException):
    """Ends a pass that is no longer needed or went wrong. A `BaseException`, so that no model's `except` catches it."""

    def __init__(self, recorder: "Recorder") -> None:
        self.recorder = recorder


class Recorder:
    """Fills one `Captured` from hooks, in the thread that created it."""

    def __init__(
        self,
        model: nn.Module,
        asked: Mapping[nn.Module, list[Hashable]],
        requests: Mapping[Any, Request],
        stop: bool,
        evident: Evident,
    ) -> None:
        self.model, self.asked, self.requests, self.stop = model, asked, requests, stop
        self.evident = evident
        self.captured = Captured()
        self.runs = dict.fromkeys(asked, 0)
        self.kept: dict[Hashable, deque[tuple[Tensor, int]]] = {}
        self.grad = torch.is_grad_enabled()
        self.thread, self.elsewhere = threading.get_ident(), False
        self.backward = torch._C._current_graph_task_id()
        self.begun, self.stopped = False, False
        self.error: Exception | None = None
        self.batch: int | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before the model runs."""
        if self._ours():
            self.begun, self.grad = True, torch.is_grad_enabled()
            firsts = {x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim}
            self.batch = firsts.pop() if len(firsts) == 1 else None

    def record(self, module: nn.Module, _module: nn.Module, args: object, output: Any) -> None:
        """Called after a module has run; `module` is the requested one, `_module` may be its replica."""
        if not self._ours():
            return
        self.runs[module] += 1
        try:
            for key in self.asked[module]:
                self._keep(key, module, output)
        except Exception as error:
            self.error = error
        if self.error is not None or (self.stop and len(self.captured.features) == len(self.requests)):
            self.stopped = True
            raise Stop(self)

    def finish(self, model: nn.Module, args: object, output: Any) -> None:
        """Called after the model has run."""
        if self._ours():
            self.captured.output, self.captured.head = output, ends(model)

    def check(self) -> None:
        """Raise for errors in hooks, for modules that did not run and for outputs that were changed in place."""
        if self.error is not None:
            try:
                raise self.error from None
            finally:
                self.error = None  # its traceback refers to this object: a cycle that would keep features alive
        if len(self.captured.features) < len(self.requests):
            self._refuse_missing()
        for key, kept in self.kept.items():
            for tensor, version in kept:
                if tensor._version == version:
                    continue
                raise RuntimeError(
                    f"the output of {self.requests[key].name!r} was changed in place after it was captured, as by "
                    "ReLU(inplace=True) or +=; write take=torch.clone to keep the value before the "
                    "change, write inplace=False, or capture the module that changes it"
                )

    def _refuse_missing(self) -> None:
        """Raise for modules that were not captured, with the reason."""
        for module, keys in self.asked.items():
            missing = self._missing(keys)
            if missing and self.runs[module]:
                which = next(self.requests[key].which for key in keys if key not in self.captured)
                raise RuntimeError(f"{missing} ran {self.runs[module]} times, not as often as which={which!r} asks for")
            if missing and self.elsewhere:
                raise RuntimeError(
                    f"{missing} ran in other threads only, as under nn.DataParallel; open `capture` in the "
                    "thread that runs the model, and use DistributedDataParallel"
                )
        if absent := {name: m for m, keys in self.asked.items() for name in self._missing(keys)}:
            raise RuntimeError(not_run(unwrap(self.model), absent, self.begun))

    def _tells(self, request: Request, module: nn.Module, output: Any, tensor: Tensor) -> Tells:
        """What is known about a feature's axes. If `take` computed it, only the inputs' batch is known."""
        found = self.evident.of(module, self.model, tensor.shape)
        if not _by_itself(request, output, tensor):
            part = request.take is None or (not callable(request.take) and levels(output))
            found = found.of_part() if part else NOTHING
        configured = width(unwrap(self.model)) if isinstance(request.name, int) else None
        return Tells(found, configured, inputs=self.batch)

    def _missing(self, keys: Iterable[Hashable]) -> list[Name]:
        """The names that were not captured, each once."""
        return list(dict.fromkeys(self.requests[key].name for key in keys if key not in self.captured))

    def _ours(self) -> bool:
        """Whether this is the recorded pass: not in another thread, and not recomputed inside a later backward()."""
        here = threading.get_ident() == self.thread
        self.elsewhere |= not here
        return here and torch._C._current_graph_task_id() == self.backward

    def _keep(self, key: Hashable, module: nn.Module, output: Any) -> None:
        request, run = self.requests[key], self.runs[module] - 1
        name, number = request.name, _number(request.which)
        if request.which == "once" and run:
            raise RuntimeError(
                f"{name!r} ran more than once inside the `with`. If it is used several times, kdloss.capture takes "
                "which='first', 'last', 'all' (a list) or the number of one, and a criterion reads modules that run "
                "once, like those around it; else make one forward pass in the `with`"
            )
        if number is not None and 0 <= number != run:
            return
        tensor = taken(name, output, request.take)
        bare = self.grad and tensor.is_floating_point() and not tensor.requires_grad
        if bare and any(p.requires_grad for p in module.parameters()):
            raise RuntimeError(f"{name!r} gave a tensor without gradient although it is trained: {no_gradient()}")
        self.captured.tells[key] = self._tells(request, module, output, tensor)
        if request.shape_alone:
            tensor = torch.empty_like(tensor, device="meta")
        if tensor.is_inference():
            # Changes in place are not tracked for these tensors, and no loss can save them for backward.
            with torch.inference_mode(False):
                tensor = tensor.clone()
        if key not in self.kept:
            self.kept[key] = deque(maxlen=None if number is None else max(1, -number))
        kept = self.kept[key]
        kept.append((tensor, tensor._version))
        if number is None:
            self.captured.features[key] = [tensor for tensor, _ in kept]
        elif len(kept) == kept.maxlen:
            self.captured.features[key] = kept[0][0]


def _by_itself(request: Request, output: Any, tensor: Tensor) -> bool:
    """Whether this is the tensor that is taken from the output by default."""
    if isinstance(output, Tensor):
        return tensor is output or request.take is torch.clone
    return isinstance(output, tuple) and len(output) > 0 and tensor is output[0]


def known_at_the_end(which: Which) -> bool:
    """Whether all runs of the module are needed to know which of them is captured."""
    number = _number(which)
    return number is None or number < 0


def _number(which: Which) -> int | None:
    """The index of the run that is captured; None for all runs."""
    return None if which == "all" else _NUMBERS[which] if isinstance(which, str) else which
