"""All kinds of logits, and the functions that take any of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise
from kdloss.targets.lazy import LazyLogits
from kdloss.targets.mixture import Mixture
from kdloss.targets.sharded import ShardedLogits
from kdloss.targets.top_k import TopKLogits

AnyLogits = Tensor | LazyLogits | TopKLogits | Mixture | ShardedLogits
Classes = slice | Tensor | None
"""Some entries of a vocabulary; None for all."""
KINDS = (Tensor, LazyLogits, TopKLogits, Mixture, ShardedLogits)  # older torch compiles no isinstance of a union


def at(x: AnyLogits, pick: Callable[[Tensor], Tensor]) -> AnyLogits:
    """The logits at chosen positions."""
    return pick(x) if isinstance(x, Tensor) else x.at(pick)


def is_double(x: AnyLogits) -> bool:
    """Whether comparisons with these logits are computed in float64."""
    if isinstance(x, Mixture):
        return any(map(is_double, x.teachers))
    if isinstance(x, ShardedLogits):
        return is_double(x.local)
    numbers = x.hidden if isinstance(x, LazyLogits) else x.log_probs if isinstance(x, TopKLogits) else x
    return numbers.dtype == torch.float64


def classes(x: AnyLogits) -> int | None:
    """The number of classes, or None where it isn't known."""
    return x.vocabulary if isinstance(x, TopKLogits) else x.shape[-1]


def known_classes(x: AnyLogits) -> int:
    """The number of classes; an error where it isn't known."""
    found = classes(x)
    if found is None:
        raise ValueError(
            "top-k logits need their number of classes here, where vocabularies differ; write "
            "TopKLogits(..., vocabulary=number of the teacher's classes)"
        )
    return found


def chosen_classes(x: AnyLogits, ids: Classes) -> AnyLogits:
    """Only some entries of the vocabulary, in this order."""
    if ids is None:
        return x
    if isinstance(x, TopKLogits):
        vocabulary = known_classes(x)
        kept = torch.arange(vocabulary, device=x.device)[ids]
        new = torch.full((vocabulary,), -1, device=x.device)
        new[kept] = torch.arange(len(kept), device=x.device)
        return x.renamed(new, len(kept))
    if isinstance(x, ShardedLogits):
        raise TypeError("a sharded vocabulary can't be cut or mapped; bring both sides to one before sharding")
    return chosen(x, ids) if isinstance(x, Tensor) else x.classes(ids)


def chosen(x: Tensor, ids: Classes) -> Tensor:
    """Some columns of a tensor."""
    if ids is None:
        return x
    return x[..., ids] if isinstance(ids, slice) else x.index_select(-1, ids)


def dense(x: AnyLogits, temperature: float = 1.0) -> Tensor:
    """The logits as a tensor, for a loss at this temperature."""
    if isinstance(x, Mixture):
        return x.dense(temperature)
    if isinstance(x, TopKLogits):
        raise TypeError("top-k logits are a teacher's; a student gives all of its logits, or LazyLogits")
    if isinstance(x, ShardedLogits):
        raise TypeError("this loss needs the whole vocabulary in one process, which sharded logits don't have")
    return x.dense() if isinstance(x, LazyLogits) else x


def against(student: AnyLogits, teacher: AnyLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Both as tensors over the same classes, ready for any divergence at this temperature."""
    check(student, teacher)
    z = dense(student, temperature)
    if isinstance(teacher, TopKLogits):
        return teacher.detach().against(precise(z))
    return z, dense(teacher.detach(), temperature).detach()


def check(student: AnyLogits, teacher: AnyLogits) -> None:
    """Raise unless student and teacher have the same positions, one vocabulary and one device."""
    for whose, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, (LazyLogits, TopKLogits, Mixture, ShardedLogits)):
            _checks.floating(f"{whose} logits", x)
    if not isinstance(student, (Tensor, LazyLogits, ShardedLogits)):
        raise TypeError(f"the student's logits are a tensor or LazyLogits, got {type(student).__name__}")
    shares = [x.sizes if isinstance(x, ShardedLogits) else None for x in (student, teacher)]
    if shares[0] != shares[1]:
        raise ValueError(
            "student and teacher must both be sharded over the vocabulary, in the same way, or neither; bring the "
            "teacher's logits to the student's placement, or write kdloss.ShardedLogits(local_logits, group)"
        )
    _checks.logit_shapes(student.shape, teacher.shape, classes(teacher))
    _checks.same_place("teacher logits", student, teacher)
