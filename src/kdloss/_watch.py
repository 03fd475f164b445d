"""What a training loop forgot, seen from its optimizers' steps and said once."""

import gc
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def watch(student: nn.Module, criterion: nn.Module, log: logging.Logger) -> None:
    """Warn, once, when the student's optimizer steps and no optimizer has the criterion's parameters.

    Both are held weakly. After the first step that tells, or without them, nothing is left of it.
    """
    students = _watched.setdefault(criterion, weakref.WeakSet())
    if student not in students:
        students.add(student)
        _Listener(partial(_check, log), student, criterion)


def left_over(student: nn.Module, criterion: nn.Module) -> bool:
    """Before a `backward()`: whether `zero_grad` reached the student and not the criterion.

    It tells by gradients that are None; those set to zeros are gradients.
    """
    return _has_gradients(criterion) and not _has_gradients(student)


class Steps:
    """How many steps all optimizers in the process have taken since `start`; copies begin at 0, not started.

    Steps that are compiled don't count, nor does any after the first `torch.compile` in older torch.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._listener: _Listener | None = None

    def start(self) -> None:
        """Count from now on; where it counts already, nothing."""
        self._listener = self._listener or _Listener(_count, self)

    def remove(self) -> None:
        """Count no more."""
        if self._listener:
            self._listener.leave()
        self._listener = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, ()


class Reminder:
    """Says once that a step was taken and not counted: between two forward passes some optimizer stepped."""

    def __init__(self) -> None:
        self._steps, self._counted, self._said = Steps(), True, False

    def forward(self, log: logging.Logger) -> None:
        """Before a forward pass whose loss depends on the step."""
        if self._said:
            return
        if self._steps.taken and not self._counted:
            self._said = True
            self._steps.remove()
            log.warning(
                "an optimizer stepped and the criterion did not: what is scheduled stays where it is. Write "
                "criterion.advance() after optimizer.step()"
            )
            return
        self._steps.start()
        self._steps.taken, self._counted = 0, False

    def advanced(self) -> None:
        """The step was counted."""
        self._counted = True


def _count(optimizer: Optimizer, steps: Steps) -> bool:
    steps.taken += 1
    return False


def _check(log: logging.Logger, optimizer: Optimizer, student: nn.Module, criterion: nn.Module) -> bool:
    """Whether this step told all there is to know."""
    trained = {id(p): name for name, p in criterion.named_parameters() if p.requires_grad}
    held = _held(optimizer)
    if trained and held.isdisjoint(trained):
        if not any(p.requires_grad and id(p) in held for p in student.parameters()):
            return False  # somebody else's
        others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer))
        if all(_held(other).isdisjoint(trained) for other in others):
            log.warning(
                "%s took a step with the student's parameters, and no optimizer has the criterion's, which stay "
                "as they are: %s. Write optimizer = AdamW([*student.parameters(), *criterion.parameters()]), or "
                "train a kdloss.Distillation, whose parameters() are both",
                *(type(optimizer).__name__, ", ".join(trained.values())),
            )
    return True


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def _has_gradients(module: nn.Module) -> bool:
    return any(p.requires_grad and p.grad is not None for p in module.parameters())


class _Listener:
    """Is told of every step of any optimizer until it is done, or what it holds weakly is gone."""

    def __init__(self, told: Callable[..., bool], *weakly: object) -> None:
        global _handle
        self.told, self.weakly = told, [weakref.ref(one, self.leave) for one in weakly]
        _listeners.append(self)
        _handle = _handle or register_optimizer_step_post_hook(_stepped)

    def leave(self, _: object = None) -> None:
        if _listeners and self in _listeners:  # None at the interpreter's end
            _listeners.remove(self)
            _let_go(inside=False)


_listeners: list[_Listener] = []
_handle: RemovableHandle | None = None  # one for all of them


def _stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if torch.compiler.is_compiling():
        return  # a graph would keep what is asked now
    for listener in [*_listeners]:
        try:
            done = listener.told(optimizer, *(ref() for ref in listener.weakly))
        except Exception:  # a hint is not worth anybody's step
            done = True
        if done:
            listener.leave()
    _let_go(inside=True)


def _let_go(inside: bool) -> None:
    """Remove the hook when nobody needs it and torch, on its way through all hooks, would not raise for it.

    That is where it is the last one, and from outside the only one; else a later step does it.
    """
    global _handle
    hooks = _handle.hooks_dict_ref() if _handle else None
    if _handle and hooks and not _listeners and _handle.id == next(reversed(hooks)) and (inside or len(hooks) == 1):
        _handle.remove()
        _handle = None
