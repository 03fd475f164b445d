"""Schedules: weights and temperatures as functions of the training step."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

Schedule = Callable[[int], float]
Setting = float | Schedule

__all__ = ["constant", "cosine", "exponential", "linear", "warmup"]


def constant(value: float) -> Schedule:
    r"""The same value at every step.

    $c$

    - `value`: a finite number.

    Wherever a setting is expected, a plain number means the same. Use this where only a function is accepted.

    Raises: TypeError for a value that is not a number; ValueError for one that is not finite.

    >>> constant(0.5)(7)
    0.5
    """
    return _Constant(_number("constant(value)", value))


def linear(start: float, end: float, steps: int) -> Schedule:
    r"""A straight line from `start` to `end`; after that it stays at `end`.

    $a + (b - a) \min(k / n, 1)$ at step $k$, with $a$ = `start`, $b$ = `end`, $n$ = `steps`.

    - `start`: the value at step 0.
    - `end`: the value at `steps` and after.
    - `steps`: in how many steps, 1 or more.

    Raises: TypeError for ends that are not numbers or steps that are not an integer; ValueError for ends
    that are not finite or fewer than 1 step.

    >>> temperature = linear(4, 1, steps=100)
    >>> [temperature(step) for step in (0, 50, 100, 1000)]
    [4.0, 2.5, 1.0, 1.0]

    As the weight of the labels, from 0 to 1, it is the "teacher annealing" of Clark et al. 2019, "BAM! Born-Again
    Multi-Task Networks for Natural Language Understanding", arXiv:1907.04829. As a temperature: Jafari et
    al. 2021, "Annealing Knowledge Distillation", arXiv:2104.07163.
    """
    return _Between(_linear, *_ends("linear", start, end), _steps("linear", steps, least=1))


def cosine(start: float, end: float, steps: int) -> Schedule:
    r"""Half a cosine from `start` to `end`, flat at both ends and steep between; after that it stays at `end`.

    $b + (a - b) \frac{1 + \cos(\pi \min(k / n, 1))}{2}$ at step $k$, with $a$ = `start`, $b$ = `end`,
    $n$ = `steps`.

    - `start`: the value at step 0.
    - `end`: the value at `steps` and after.
    - `steps`: in how many steps, 1 or more.

    Raises: TypeError for ends that are not numbers or steps that are not an integer; ValueError for ends
    that are not finite or fewer than 1 step.

    >>> weight = cosine(1, 0, steps=3)
    >>> [round(weight(step), 6) for step in (0, 1, 2, 3, 4)]
    [1.0, 0.75, 0.25, 0.0, 0.0]

    One period of Loshchilov & Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983.
    """
    return _Between(_cosine, *_ends("cosine", start, end), _steps("cosine", steps, least=1))


def exponential(start: float, end: float, steps: int) -> Schedule:
    r"""From `start` to `end`, multiplied by the same factor at each step; after that it stays at `end`.

    $a \, (b / a)^{\min(k / n, 1)}$ at step $k$, with $a$ = `start`, $b$ = `end`, $n$ = `steps`.

    - `start`: the value at step 0, above 0.
    - `end`: the value at `steps` and after, above 0.
    - `steps`: in how many steps, 1 or more.

    Raises: TypeError for ends that are not numbers or steps that are not an integer; ValueError for ends
    that are not finite and above 0, or fewer than 1 step.

    >>> temperature = exponential(8, 1, steps=3)
    >>> [round(temperature(step), 6) for step in (0, 1, 2, 3, 4)]
    [8.0, 4.0, 2.0, 1.0, 1.0]
    """
    start, end = _ends("exponential", start, end)
    if min(start, end) <= 0:
        raise ValueError(
            f"exponential multiplies at each step, so both ends must be above 0, got start={start!r}, end={end!r}; "
            "write a small one, for example 1e-3, or linear or cosine, which may begin or end at 0"
        )
    return _Between(_exponential, start, end, _steps("exponential", steps, least=1))


def warmup(steps: int, then: Setting) -> Schedule:
    r"""A straight line from 0 up to the value of `then`, and `then` itself afterwards.

    $\frac{k}{n} f(n)$ at step $k < n$, and $f(k)$ from there on, with $f$ = `then`, $n$ = `steps`.

    - `steps`: the number of warmup steps, 0 or more; with 0 it is `then` alone.
    - `then`: a number, or another schedule, whose steps are counted from the start of training, not from the end of
      the warmup.

    Raises: TypeError for steps that are not an integer, or a `then` that is neither a number nor a function;
    ValueError for steps below 0, or a number that is not finite.

    >>> weight = warmup(10, then=linear(1, 0, steps=100))
    >>> [weight(step) for step in (0, 5, 10, 100)]
    [0.0, 0.45, 0.9, 0.0]

    For learning rates: Goyal et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
    arXiv:1706.02677.
    """
    then = then if callable(then) else _number("warmup(then)", then)
    return _Warmup(_steps("warmup", steps, least=0), then)


def at(setting: Setting, step: int) -> float:
    """The value of a setting at a step: a number itself, or a function's value.

    - `setting`: a number, or a function of the step.
    - `step`: how many steps were taken before this one.

    Raises: TypeError for a setting that is neither, or a function that returns no number; ValueError for a value that
    is not finite. The error names the step.

    >>> at(0.5, 3), at(linear(0, 1, steps=4), 3), at(lambda step: 2.0**-step, 3)
    (0.5, 0.75, 0.125)
    """
    if not callable(setting):
        return _number("a setting", setting)
    return _number(f"{setting!r} at step {step}", setting(step))


@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"constant({self.value!r})"


@dataclass(frozen=True)
class _Between:
    """From one value to another along a curve, a function of the fraction of steps done; both ends are exact."""

    curve: Callable[[float, float, float], float]
    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        if step <= 0:
            return self.start
        if step >= self.steps:
            return self.end
        low, high = sorted((self.start, self.end))  # rounding may leave these bounds by an ulp
        return min(max(self.curve(self.start, self.end, step / self.steps), low), high)

    def __repr__(self) -> str:
        return f"{self.curve.__name__[1:]}({self.start!r}, {self.end!r}, steps={self.steps})"


@dataclass(frozen=True)
class _Warmup:
    steps: int
    then: Setting

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return at(self.then, step)
        return max(step, 0) / self.steps * at(self.then, self.steps)

    def __repr__(self) -> str:
        return f"warmup({self.steps}, then={self.then!r})"


def _linear(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


def _cosine(start: float, end: float, done: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * done)) / 2


def _exponential(start: float, end: float, done: float) -> float:
    return math.exp(math.log(start) + (math.log(end) - math.log(start)) * done)


def _ends(name: str, start: float, end: float) -> tuple[float, float]:
    return _number(f"{name}(start)", start), _number(f"{name}(end)", end)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; write .item() once, outside of the training" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}; write a number like 0.5")
    return float(value)


def _steps(name: str, value: int, least: int) -> int:
    example = f"{name}(..., steps=1000)"
    try:
        count = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{name}(steps) must be an integer, got {value!r}; write for example {example}")
    if count < least:
        raise ValueError(f"{name}(steps) must be {least} or more, got {count}; write for example {example}")
    return count
