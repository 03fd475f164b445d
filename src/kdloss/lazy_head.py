"""Run Hugging Face language models without making their full logits.

In the pass the head gets only the first position, so everything around it (DDP, peft, accelerate, the model's own scale
or soft cap) runs as usual, on logits `[1, 1, V]`. The head's full input is kept for `LazyLogits`.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdloss._head import Paths, why_full
from kdloss._shaping import is_shaped, shaping, signal_like, trained_since
from kdloss.layers.names import unwrap
from kdloss.reduction import on_cpu
from kdloss.targets import LazyLogits
from kdloss.terms._outputs import find_logits

_log = logging.getLogger("kdloss")


class LazyHeads:
    """Remembers what each model of a `Distiller` does to its head's output, or why its full logits are made."""

    def __init__(self) -> None:
        self._shaping: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
        self._failed: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._repeatable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._paths = Paths()

    def __reduce__(self) -> tuple[Any, ...]:
        return LazyHeads, ()

    def without_logits(self, model: nn.Module, otherwise: str | None) -> AbstractContextManager["HeadPass | None"]:
        """Keep the head from making full logits, if possible, in the one forward pass made inside the `with`.

        The `with` gives a `HeadPass` for `finish`, or None if full logits are made. `otherwise` is the caller's reason
        to make them, if it has one.
        """
        compiled = "the step is being compiled" if torch.compiler.is_compiling() else None
        reason = otherwise or compiled or self._failed.get(model)
        path = [] if reason else self._paths.to_head(model)
        reason = reason or why_full(path)
        if reason is not None:
            self._say(model, reason)
            return nullcontext()
        return HeadPass(cast(nn.Linear, path[-1]), self._known(model))

    def finish(self, model: nn.Module, ran: "HeadPass", output: Any) -> bool:
        """Put lazy logits into the output; False if the pass has to be made again, as measured anew or in full."""
        if not ran.hidden:
            self._say(model, "its head did not run, or where no hook sees it")
            return True
        failed = ran.finish(output)
        if failed is not None:
            if ran.remembers:
                del self._shaping[model]
            else:
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
    """One forward pass, inside its `with`: the head's input, and what the model makes of its output.

    If that isn't known yet, the output is replaced by a test signal. If it is, it is only checked.
    """

    def __init__(self, head: nn.Linear, shaping: dict[str, Any] | None = None) -> None:
        self.head, self.shaping, self.remembers = head, shaping, shaping is not None
        self.hidden: list[Tensor] = []
        self.given: Tensor | None = None
        self.node: Any = None
        self.shown: torch.Size | None = None
        self.thread = threading.get_ident()
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> "HeadPass":
        before, after = (partial(_uncompiled(hook), self) for hook in (HeadPass.before, HeadPass.after))
        self.hooks = [self.head.register_forward_pre_hook(before), self.head.register_forward_hook(after)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Keep the hidden states, in the dtype that autocast gives the head, and pass on only the first position."""
        if threading.get_ident() != self.thread or not args:
            return None
        hidden = args[0]
        self.hidden.append(hidden.to(_autocast(hidden)))
        first: Tensor = hidden[(slice(1),) * (hidden.ndim - 1)]
        self.shown = torch.Size((*first.shape[:-1], self.head.weight.shape[0]))
        return first

    def after(self, head: nn.Module, args: object, z: Tensor) -> Tensor:
        """Keep the head's output; in the first pass a test signal takes its place, in the same graph (for DDP)."""
        if threading.get_ident() != self.thread or not self.hidden or not z.numel():
            return z
        if self.remembers:
            self.given = z.detach().clone() if on_cpu(z.device) else None  # the model may change its logits in place
        else:
            self.given = signal_like(z)
            z = torch.where(torch.ones_like(z, dtype=torch.bool), self.given, z)
        self.node = z.grad_fn
        return z

    def finish(self, output: Any) -> str | None:
        """Put lazy logits into the output, or return the reason why that isn't possible."""
        head, answer = self.head, find_logits(output)
        if len(self.hidden) != 1:
            return f"its head ran {len(self.hidden)} times"
        if not isinstance(answer, Tensor):
            return "its output has no logits"
        if answer.shape != self.shown:
            return f"it makes {tuple(answer.shape)} of its head's {tuple(self.shown or ())}"
        if answer.numel() and (reason := self._follow(answer)) is not None:
            return reason
        lazy = LazyLogits(*_aliases(self.hidden[0], head.weight, head.bias), **self.shaping or {})
        if isinstance(output, dict):
            output["logits"] = lazy
        else:
            output.logits = lazy
        return None

    def _follow(self, answer: Tensor) -> str | None:
        """Measure or check the model's answer to what it was given; the reason if lazy logits can't give the same."""
        if trained_since(self.node, answer):
            return "a parameter of its own is trained between its head and its logits"
        if self.given is None:
            return None
        if not self.remembers:
            self.shaping = shaping(self.given, answer.detach())
            return None if self.shaping else "it does more to its head's output than to scale and soft-cap it"
        same = is_shaped(self.given, answer.detach(), self.shaping or {})
        return None if same else "it does something else to its head's output than before"


@cache
def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that always runs outside compiled code; made once and late, since it imports the compiler."""
    disable: Any = torch.compiler.disable
    return disable(hook)  # type: ignore[no-any-return]


def _aliases(*tensors: Tensor | None) -> Any:
    """The same tensors as new results: FSDP puts hooks on what a model returns, and would leave one on the weight."""
    if torch.is_grad_enabled():
        return _Alias.apply(*tensors)  # type: ignore[no-untyped-call]
    return [None if t is None else t.detach() for t in tensors]


class _Alias(torch.autograd.Function):
    """New results that are no views, which FSDP2 warns of."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return gradients


def _autocast(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply a tensor."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype
