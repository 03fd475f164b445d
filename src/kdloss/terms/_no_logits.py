"""The error for an output without `logits`, because it has several or they have another name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdloss._capture.take import Key, described


def no_logits(output: Any, whose: str) -> TypeError:
    """The error, with a sum to write for the tensors that may be logits.

    >>> print(no_logits((Tensor(2, 3), Tensor(2, 3)), "student"))  # doctest: +ELLIPSIS
    the student's logits are needed, and it returned a tuple ...: pass ... kdloss.CrossEntropy(take=0) ...
    """
    found = _candidates(output)
    named = [key for key in found if isinstance(key, str) and "logits" in key]
    came = f"the {whose}'s logits are needed, and it returned {described(output)}"
    if len(named) > 1:
        share = f"{0.5 / len(named):.3g}"
        each = " + ".join(f"{share} * kdloss.Logits(take={key!r}, name={key!r})" for key in named)
        return TypeError(
            f"{came}: several heads, which need one term each. Write 0.5 * kdloss.Task() + {each}, where Task() is the "
            "loss that the student computes from its own labels (pass start_positions=... and the like), or one "
            f"kdloss.CrossEntropy(take={named[0]!r}) for a head whose labels you pass as labels=..."
        )
    first = (named or found or [0])[0]
    other = "" if whose == "student" else f", teacher_take={first!r}"
    return TypeError(
        f"{came}: pass a tensor, or an output or dict that has logits, or say where they are by take=... (an index, a "
        f"key, a path or a function; teacher_take=... where the teacher's differ): 0.5 * kdloss.CrossEntropy("
        f"take={first!r}) + 0.5 * kdloss.Logits(temperature=2.0, take={first!r}{other}) in place of a recipe"
    )


def _candidates(output: Any) -> list[Key]:
    """The keys or indices of the output's tensors that may be logits."""
    if isinstance(output, Mapping):
        items: Any = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    else:
        items = vars(output).items() if hasattr(output, "__dict__") else ()
    return [key for key, x in items if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1]
