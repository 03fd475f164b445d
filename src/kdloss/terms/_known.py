"""What is known of a step on tensors, so that the next one like it is a sweep and nothing else."""

from typing import Any

import torch
from torch import Tensor, nn

from kdloss.engine.task import unwrapped
from kdloss.terms._evaluation import Evaluation
from kdloss.terms._positions import Positions
from kdloss.terms._sweep import Swept, sweep
from kdloss.terms.contract import Contract
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.logits import Logits
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step

Found = tuple[Tensor, dict[str, Tensor]]
_READS = Reads(logits="any")


class Known:
    """The last step of a sum in which all terms were one sweep over logits that are tensors.

    It is known by all that decides that, and whether inputs fit: settings, shapes, dtypes and devices. Numbers, like
    weights and temperatures, labels and masks are read anew in every step. Copies and pickles know nothing.
    """

    def __init__(self) -> None:
        self._key: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()

    def step(
        self,
        criterion: Any,
        contract: Contract,
        student: Any,
        teacher: Any,
        labels: Any,
        mask: Tensor | None,
        items: int | Tensor | None,
    ) -> Found | None:
        """Loss and components of a step like the last; None where it is another."""
        if self._key is None or torch._C._functorch.maybe_current_level() is not None:
            return None
        weights = _weights(criterion)
        if _key(criterion, contract, weights, student, teacher, labels) != self._key:
            return None
        causal, terms = bool(contract.causal), criterion.terms
        where = Positions.of(student.shape[:-1], labels, mask, causal=causal, ignore_index=contract.ignore_index)
        taught = None if teacher is None else teacher.detach()
        step = Step(student, taught, labels, where, _no_features, _READS, criterion.step, _nothing)
        swept = [Swept(terms[name], weight, step, student) for name, weight in weights.items() if _counts(weight)]
        return sweep(swept, where, contract, items, known=True)

    def learn(self, evaluation: Evaluation, student: Any, teacher: Any, labels: Any) -> None:
        """Know steps like this one from now on, if it was of that kind."""
        criterion, contract = evaluation.criterion, evaluation.contract
        alone = len(evaluation.losses) == 1 and len(evaluation.swept) == len(evaluation.terms)
        plain = alone and contract.layouts == (None, None) and not contract.check_finite
        if plain and all(map(_plain, criterion.terms.values())) and _are_tensors(student, teacher, labels):
            self._key = _key(criterion, contract, _weights(criterion), student, teacher, labels)
        else:
            self._key = None


def _weights(criterion: Any) -> dict[str, float | Tensor]:
    return {name: weight.at(criterion.step) for name, weight in criterion.weights.items()}


def _counts(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight > 0


def _key(criterion: Any, contract: Contract, weights: Any, *inputs: Any) -> tuple[Any, ...]:
    """All that decides how a step goes, but for numbers."""
    terms = [_settings(term) for term in criterion.terms.values()]
    return contract, terms, [*map(_counts, weights.values())], [*map(_form, inputs)]


def _settings(term: Any) -> tuple[Any, ...]:
    if type(term) is CrossEntropy:
        return term, term.take, term.positions, term.label_smoothing, _form(term.class_weights)
    if type(term) is Logits:
        return term, term.take, term.positions, term.teacher, term.teacher_take, term.divergence, term.vocabulary
    return (term,)


def _plain(term: Any) -> bool:
    """Whether its settings are all that it goes by, and no module is among them, which may be changed in place."""
    if type(term) is CrossEntropy:
        return term.take is None and term.positions == "labels"
    if type(term) is not Logits or isinstance(unwrapped(term.divergence)[0], nn.Module):
        return False
    taken = term.take, term.teacher_take, term.vocabulary
    return taken == (None, None, None) and term.positions == "labels" and not term.several


def _form(x: Any) -> Any:
    return (x.shape, x.dtype, x.device) if type(x) is Tensor else type(x)


def _are_tensors(student: Any, teacher: Any, labels: Any) -> bool:
    one = type(student) is Tensor and all(x is None or type(x) is Tensor for x in (teacher, labels))
    return one and not (labels is not None and labels.is_floating_point())


def _no_features(layer: Any, shape: Any) -> tuple[None, bool]:
    return None, False


def _nothing(name: str, values: Tensor) -> None:
    """These terms report nothing themselves."""
