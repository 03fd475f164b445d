"""What a Trainer has to know about a criterion."""

from typing import Any

from torch import nn

from kdloss.reduction import takes
from kdloss.terms import CrossEntropy, Sum, Task
from kdloss.terms.contract import Contract


def always_cross_entropy(criterion: nn.Module) -> bool:
    """Whether a criterion is exactly the student's own loss, with weight 1 and at every step.

    >>> import kdloss
    >>> always_cross_entropy(kdloss.VanillaKD(alpha=1.0)), always_cross_entropy(kdloss.VanillaKD(alpha=0.99))
    (True, False)
    """
    if not isinstance(criterion, Sum) or criterion.contract != Contract():
        return False
    factors = {name: weight.factors for name, weight in criterion.weights.items()}
    counting = [name for name, own in factors.items() if own != (0.0,)]
    return len(counting) == 1 and factors[counting[0]] == (1.0,) and _is_own(criterion.terms[counting[0]])


def reads_index(criterion: nn.Module) -> bool:
    """Whether a distance has a parameter `index`: which example of the data set each example is."""
    terms = criterion.terms.values() if isinstance(criterion, Sum) else []
    found = [thing for term in terms for thing in (getattr(term, "distance", None), *term.modules())]
    return any(callable(thing) and takes(thing, "index") for thing in found)


def _is_own(term: Any) -> bool:
    if type(term) is Task:
        return term.function is None and term.take is None and term.positions == "labels"
    plain = type(term) is CrossEntropy and term.take is None and term.positions == "labels"
    return plain and not term.label_smoothing and term.class_weights is None
