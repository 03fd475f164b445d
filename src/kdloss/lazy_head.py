"""Run Hugging Face language models without making their full logits.

In the pass the head gets only the first position, so everything around it (DDP, peft, accelerate, the model's own scale
or soft cap) runs as usual, on logits `[1, 1, V]`. The head's full input is kept for `LazyLogits`.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdloss.layers.names import attribute, unwrap
from kdloss.targets import LazyLogits
from kdloss.terms._outputs import find_logits

_log = logging.getLogger("kdloss")
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


class LazyHeads:
    """Remembers what each model of a `Distiller` does to its head's output, or why its full logits are made."""

    def __init__(self) -> None:
        self._shaping: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
        self._failed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._repeatable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyHeads, ()

    def without_logits(self, model: nn.Module, otherwise: str | None) -> AbstractContextManager["HeadPass | None"]:
        """Keep the head from making full logits, if possible, in the one forward pass made inside the `with`.

        The `with` gives a `HeadPass` for `finish`, or None if full logits are made. `otherwise` is the caller's reason
        to make them, if it has one.
        """
        head = _head(model)
        reason = otherwise or self._failed.get(model) or why_full(model, head)
        if reason is not None or not isinstance(head, nn.Linear):
            self._say(model, str(reason))
            return nullcontext()
        return self._hooked(HeadPass(head, self._known(model)), head)

    @contextmanager
    def _hooked(self, ran: "HeadPass", head: nn.Module) -> Iterator["HeadPass"]:
        handles = [
            head.register_forward_pre_hook(partial(_uncompiled(HeadPass.before), ran)),
            head.register_forward_hook(partial(_uncompiled(HeadPass.after), ran)),
        ]
        try:
            yield ran
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, model: nn.Module, ran: "HeadPass", output: Any) -> bool:
        """Put lazy logits into the output; False if the pass has to be made again, with full logits."""
        if not ran.hidden:
            self._say(model, "its head did not run, or where no hook sees it")
            return True
        failed = ran.finish(output)
        if failed is not None:
            self._failed[model] = failed
            return False
        if ran.shaping is not None:
            self._shaping[model] = ran.shaping
        return True

    def _known(self, model: nn.Module) -> dict[str, Any] | None:
        """What is known of a head; nothing if checkpointing, in backward(), recomputes the pass that found it out."""
        known = self._shaping.get(model)
        if torch._C._current_graph_task_id() == -1:
            self._repeatable[model] = known is not None
        return known if self._repeatable.get(model, True) else None

    def _say(self, model: nn.Module, reason: str) -> None:
        if self._said.get(model) != reason:
            self._said[model] = reason
            _log.info("%s makes full logits: %s", type(unwrap(model)).__name__, reason)


class HeadPass:
    """One forward pass: the head's input and, if not known yet, what the model makes of a test signal."""

    def __init__(self, head: nn.Linear, shaping: dict[str, Any] | None = None) -> None:
        self.head, self.shaping = head, shaping
        self.hidden: list[Tensor] = []
        self.signal: Tensor | None = None
        self.shown: torch.Size | None = None
        self.thread = threading.get_ident()

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Keep the hidden states, in the dtype that autocast gives the head, and pass on only the first position."""
        if threading.get_ident() != self.thread or not args:
            return None
        hidden = args[0]
        self.hidden.append(hidden.to(_autocast(hidden)))
        return hidden[(slice(1),) * (hidden.ndim - 1)]

    def after(self, head: nn.Module, args: object, z: Tensor) -> Tensor:
        """The head's own output, or in the first pass a test signal in its place, in the same graph (for DDP)."""
        if threading.get_ident() != self.thread or not self.hidden:
            return z
        self.shown = z.shape
        if self.shaping is not None or not z.numel():
            return z
        self.signal = signal_like(z)
        return torch.where(torch.ones_like(z, dtype=torch.bool), self.signal, z)

    def finish(self, output: Any) -> str | None:
        """Put lazy logits into the output, or return the reason why that isn't possible."""
        head, answer = self.head, find_logits(output)
        if len(self.hidden) != 1:
            return f"its head ran {len(self.hidden)} times"
        if not isinstance(answer, Tensor):
            return "its output has no logits"
        if answer.shape != self.shown:
            return f"it makes {tuple(answer.shape)} of its head's {tuple(self.shown or ())}"
        if self.signal is not None:
            self.shaping = shaping(self.signal, answer.detach())
            if self.shaping is None:
                return "it does more to its head's output than to scale and soft-cap it"
        aliases = _Alias.apply(self.hidden[0], head.weight, head.bias)  # type: ignore[no-untyped-call]
        lazy = LazyLogits(*aliases, **self.shaping or {})
        if isinstance(output, dict):
            output["logits"] = lazy
        else:
            output.logits = lazy
        return None


@cache
def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that always runs outside compiled code; made once and late, since it imports the compiler."""
    disable: Any = torch.compiler.disable
    return disable(hook)  # type: ignore[no-any-return]


class _Alias(torch.autograd.Function):
    """The same tensors as new results: FSDP puts hooks on what a model returns, and would leave one on the weight."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return gradients


def signal_like(z: Tensor) -> Tensor:
    """A test signal in place of the logits of one position: powers of two of all sizes, exact in every dtype."""
    exponents = torch.linspace(-20, 20, z.shape[-1], device=z.device).round()
    signal = torch.exp2(exponents).to(torch.float32 if z.device.type == "mps" else torch.float64)
    signal[..., 1::2] *= -1
    return signal.expand(z.shape)


def shaping(signal: Tensor, answer: Tensor) -> dict[str, Any] | None:
    """The scale and soft cap that turn the signal into the answer; None if these alone don't."""
    x, y = signal.flatten(), answer.flatten().to(signal.dtype)
    scale = (y[0] / x[0]).item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    softcap = None if (y[-1] / x[-1] / scale).item() > 0.5 else y[-1].abs().item()
    if not 0 < abs(scale) < math.inf or not (softcap is None or 0 < softcap < math.inf):
        return None
    expected = LazyLogits(x.unsqueeze(-1), x.new_ones(1, 1), None, softcap, scale).dense().squeeze(-1)
    found = {"softcap": softcap, "scale": scale}
    return found if torch.allclose(y, expected, rtol=1e-5, atol=0.0) else None


def why_full(model: nn.Module, head: nn.Module | None) -> str | None:
    """The reason why a model's full logits have to be made, as far as it is known before the pass; None if none."""
    if torch.compiler.is_compiling():
        return "the step is being compiled"
    if head is None:
        return "it has no output embeddings"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, no plain nn.Linear"
    if type(head.weight) is not nn.Parameter or hasattr(head.weight, "ds_id") or head.weight.is_meta:
        return f"its head's weight is sharded, quantised or elsewhere ({type(head.weight).__name__})"
    hooks = head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks
    if any(hooks) or "forward" in vars(head):
        return "its head has hooks of somebody else's"
    for module in _around(model, head):
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return "it was compiled as a whole; compile its blocks instead"
        if not _SHARDED.isdisjoint(c.__name__ for c in type(module).__mro__):
            return "FSDP shards its head"
        if getattr(module, "static_graph", False) is True:
            return "DDP with static_graph=True synchronises only what its output leads to"
    return None


def _head(model: nn.Module) -> nn.Module | None:
    """A model's head; if peft trains a copy of it (`modules_to_save`), that copy."""
    inner = unwrap(model)
    find = attribute(inner, "get_output_embeddings")
    head: Any = find() if callable(find) else None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        head = next((copies[name] for name in head.active_adapters if name in copies), head)
    return head if isinstance(head, nn.Module) else None


def _around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules around the head, and the head; searched again if the head has moved."""
    found = _along(model, _places.get(model, ""))
    if found[-1] is not head:
        _places[model] = next((name for name, module in model.named_modules() if module is head), "")
        found = _along(model, _places[model])
    return found


_places: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _along(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules along a path, as far as the path exists."""
    found = [model]
    for name in filter(None, path.split(".")):
        children = found[-1]._modules
        inner = children[name] if name in children else None  # noqa: SIM401 - TorchScript's `_modules` have no `get`
        if inner is None:
            break
        found.append(inner)
    return found


def _autocast(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply a tensor."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype
