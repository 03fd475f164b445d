"""Chains of models that teach each other."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")


def chain(models: Iterable[Model], train: Callable[[Model, Model], Result]) -> list[Result]:
    r"""Train models one after the other, each with the model before it as the teacher.

    $r_i = \mathrm{train}(m_i, m_{i-1})$ for i = 1, 2, ...; returns the list of $r_i$. A teacher, its assistants and the
    student are a chain, and so are generations of one size (born-again networks).

    - `models`: the models, from a trained teacher to the last student. They are read one by one, so a generator that
      makes or loads them keeps only two in memory at a time.
    - `train`: a function of (student, teacher) that trains the student in place, in any loop, and returns any result.
      An exception ends the chain; the earlier stages stay trained.

    Raises: ValueError for fewer than two models, and for a model that would teach itself; TypeError for one model in
    place of several, and for a `train` that is not a function.

    >>> teacher, assistant, student = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    >>> chain([teacher, assistant, student], lambda student, teacher: teacher is assistant)
    [False, True]

    Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv:1902.03393; Furlanello et al.
    2018, "Born-Again Neural Networks", arXiv:1805.04770.
    """
    if not callable(train):
        raise TypeError(f"train is a function of (student, teacher), got {train!r}; write chain(models, train)")
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        one = type(models).__name__
        raise TypeError(f"chain takes several models, got one {one}; write chain([teacher, ..., student], train)")
    rest = iter(models)
    teacher: Any = next(rest, None)
    results: list[Result] = []
    for student in rest:
        if student is teacher:
            raise ValueError(
                f"model {len(results) + 2} of the chain is the same as the one before it and would be its own teacher; "
                "give each stage a model of its own: [make() for _ in range(3)], not [model] * 3"
            )
        results.append(train(student, teacher))
        teacher = student
    if not results:
        one = "none" if teacher is None else f"one {type(teacher).__name__}"
        raise ValueError(f"a chain is a teacher and at least one student, got {one}; write [teacher, student]")
    return results
