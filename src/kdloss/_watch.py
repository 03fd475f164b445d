"""Warn once about what a training loop forgot, by watching its optimizers' steps."""

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
    """Warn once if the student's optimizer steps and no optimizer has the criterion's parameters.

    Student and criterion are held weakly. The hook is removed after the first step of the student's optimizer, or when
    either is freed.
    """
    students = _watched.setdefault(criterion, weakref.WeakSet())
    if student not in students:
        students.add(student)
        _Listener(partial(_check, log), student, criterion)


def left_over(student: nn.Module, criterion: nn.Module) -> bool:
    """Whether `zero_grad` cleared the student and not the criterion; call it before `backward()`.

    It looks for gradients that are None; gradients set to zeros count as gradients.
    """
    return _has_gradients(criterion) and not _has_gradients(student)


class Steps:
    """Counts the steps of all optimizers in the process since `start`; a copy is at 0 and not started.

    Compiled steps don't count. In older torch no step after the first `torch.compile` counts.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._listener: _Listener | None = None

    def start(self) -> None:
        """Count from now on, unless it counts already."""
        self._listener = self._listener or _Listener(_count, self)

    def remove(self) -> None:
        """Stop counting."""
        if self._listener:
            self._listener.leave()
        self._listener = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, ()


class Reminder:
    """Warns once if an optimizer stepped between two forward passes and the criterion didn't advance."""

    def __init__(self) -> None:
        self._steps, self._counted, self._said = Steps(), True, False

    def forward(self, log: logging.Logger) -> None:
        """Call it before a forward pass whose loss depends on the step."""
        if self._said:
            return
        if self._steps.taken and not self._counted:
            self._said = True
            self._steps.remove()
            log.warning(
                "an optimizer stepped and the criterion did not: its scheduled weights and temperatures don't change. "
                "Write criterion.advance() after optimizer.step()"
            )
            return
        self._steps.start()
        self._steps.taken, self._counted = 0, False

    def advanced(self) -> None:
        """Call it when the criterion advanced."""
        self._counted = True


def _count(optimizer: Optimizer, steps: Steps) -> bool:
    steps.taken += 1
    return False


def _check(log: logging.Logger, optimizer: Optimizer, student: nn.Module, criterion: nn.Module) -> bool:
    """Warn if needed; True once a step of the student's optimizer was seen, so that no more are watched."""
    trained = {id(p): name for name, p in criterion.named_parameters() if p.requires_grad}
    held = _held(optimizer)
    if trained and held.isdisjoint(trained):
        if not any(p.requires_grad and id(p) in held for p in student.parameters()):
            return False  # another model's optimizer
        others = (one for one in gc.get_objects() if issubclass(type(one), Optimizer))
        if all(_held(other).isdisjoint(trained) for other in others):
            log.warning(
                "%s took a step with the student's parameters, and no optimizer has the criterion's, which are not "
                "trained: %s. Write optimizer = AdamW([*student.parameters(), *criterion.parameters()]), or "
                "train a kdloss.Distillation, whose parameters() are both",
                *(type(optimizer).__name__, ", ".join(trained.values())),
            )
    return True


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def _has_gradients(module: nn.Module) -> bool:
    return any(p.requires_grad and p.grad is not None for p in module.parameters())


class _Listener:
    """Calls a function at every step of any optimizer, until it returns True or one of its arguments is freed."""

    def __init__(self, stepped: Callable[..., bool], *weakly: object) -> None:
        global _handle
        self.stepped, self.weakly = stepped, [weakref.ref(one, self.leave) for one in weakly]
        _listeners.append(self)
        _handle = _handle or register_optimizer_step_post_hook(_stepped)

    def leave(self, _: object = None) -> None:
        if _listeners and self in _listeners:  # _listeners is None when the interpreter exits
            _listeners.remove(self)
            _let_go(inside=False)


_listeners: list[_Listener] = []
_handle: RemovableHandle | None = None  # one hook for all listeners


def _stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if torch.compiler.is_compiling():
        return  # a graph would keep this answer
    for listener in [*_listeners]:
        try:
            done = listener.stepped(optimizer, *(ref() for ref in listener.weakly))
        except Exception:  # a warning must never break a training step
            done = True
        if done:
            listener.leave()
    _let_go(inside=True)


def _let_go(inside: bool) -> None:
    """Remove the hook if nobody needs it and it is safe: torch raises if its hooks change while it runs them.

    From inside a hook it is safe if ours is the last hook, from outside if it is the only one. Otherwise a later step
    removes it.
    """
    global _handle
    hooks = _handle.hooks_dict_ref() if _handle else None
    if _handle and hooks and not _listeners and _handle.id == next(reversed(hooks)) and (inside or len(hooks) == 1):
        _handle.remove()
        _handle = None
