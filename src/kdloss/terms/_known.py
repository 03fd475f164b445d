"""A fast path for repeated steps on logits: a step like the last one goes straight to the sweep."""

from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture import Captured
from kdloss.engine.fused import tensors_of
from kdloss.engine.task import unwrapped
from kdloss.targets import LazyLogits
from kdloss.terms._ahead import Ahead
from kdloss.terms._evaluation import Evaluation
from kdloss.terms._outputs import find_logits, returned
from kdloss.terms._positions import Positions
from kdloss.terms._sweep import Swept, sweep
from kdloss.terms._teachers import Outputs
from kdloss.terms.contract import Contract
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.logits import READS, Logits
from kdloss.terms.plan import Plan
from kdloss.terms.step import Step

Found = tuple[Tensor, dict[str, Tensor]]
_KINDS = (Tensor, LazyLogits)


class Known:
    """Remembers a step whose terms were all one sweep over logits, tensors or lazy, of at most one teacher.

    A step is recognised by everything that decides this and whether inputs fit: settings, shapes, dtypes and devices.
    Numbers (weights, temperatures, labels, masks) are read again in every step. Copies and pickles remember nothing.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._taught: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()

    def step(
        self,
        criterion: Any,
        contract: Contract,
        student: Any,
        outputs: Outputs,
        labels: Any,
        mask: Tensor | None,
        items: int | Tensor | None,
        plan: Plan | None,
        ahead: Ahead | None,
    ) -> Found | None:
        """The loss and components of a step like the remembered one; None for any other step."""
        if self._key is None or torch._C._functorch.maybe_current_level() is not None:
            return None
        weights, logits = _weights(criterion) if plan is None else plan.weights, _logits(student)
        if _key(criterion, contract, weights, student, logits, labels) != self._key:
            return None
        taught = None
        if self._taught is not None:
            output = next(outputs)
            taught = _logits(output)
            taught = taught.detach() if type(taught) in _KINDS else None  # as it was when it was remembered
            if _form(taught) != self._taught or not _in_order(output):
                outputs.back(output)
                return None
            del output
        causal: Any = {"causal": bool(contract.causal), "ignore_index": contract.ignore_index, "ahead": ahead}
        where = Positions.of(logits.shape[:-1], labels, mask, **causal)
        step = Step(None, taught, labels, where, _no_features, READS, criterion.step, _nothing)
        terms = criterion.terms
        swept = [Swept(terms[name], weight, step, logits) for name, weight in weights.items()]
        return sweep(swept, where, contract, items, known=True)

    def learn(self, evaluation: Evaluation) -> None:
        """Remember this step, if it was of that kind."""
        criterion, contract, swept = evaluation.criterion, evaluation.contract, evaluation.swept
        self._key = self._taught = None
        if len(evaluation.losses) > 1 or len(swept) < max(len(evaluation.terms), 1) or contract.check_finite:
            return
        logits, labels, taught = swept[0].logits, evaluation.labels, [one.step.teacher for one in swept]
        if type(logits) not in _KINDS or not all(x is None or type(x) in _KINDS for x in (labels, *taught)):
            return
        soft = labels is not None and labels.is_floating_point()
        soft = soft or bool(evaluation.plan.weightings) or criterion.balance is not None
        if any(one.term.teacher not in ((), (0,)) for one in swept):
            return
        if not soft and contract.layouts == (None, None) and all(map(_plain, criterion.terms.values())):
            self._taught = next((_form(x) for x in taught if x is not None), None)
            self._key = _key(criterion, contract, evaluation.plan.weights, evaluation.student, logits, labels)


def _logits(output: Any) -> Any:
    return output if type(output) in _KINDS else find_logits(returned(output))


def _in_order(output: Any) -> bool:
    """Whether a teacher's named classes are in the student's order; True if they have no names."""
    classes = output.classes if isinstance(output, Captured) else None
    return classes is None or classes.student == classes.teacher


def _weights(criterion: Any) -> dict[str, float | Tensor]:
    """The weights of a step, without those that are 0."""
    every = {name: weight.at(criterion.step) for name, weight in criterion.weights.items()}
    return {name: weight for name, weight in every.items() if isinstance(weight, Tensor) or weight > 0}


def _key(criterion: Any, contract: Contract, weights: Any, student: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
    """Everything that decides how a step runs, except for numbers and the teachers' outputs."""
    terms = [_settings(term) for term in criterion.terms.values()]
    kind, head = (student.output, student.head) if isinstance(student, Captured) else (student, None)
    return contract, terms, [*weights], type(kind), head, _form(logits), _form(labels)


def _settings(term: Any) -> tuple[Any, ...]:
    if type(term) is CrossEntropy:
        return term, term.take, term.positions, term.label_smoothing, _form(term.class_weights)
    if type(term) is Logits:
        return term, term.take, term.positions, term.teacher, term.teacher_take, term.divergence, term.vocabulary
    return (term,)


def _plain(term: Any) -> bool:
    """Whether a term depends on its settings only, and none of them is a module, which could change in place."""
    if type(term) is CrossEntropy:
        return term.take is None and term.positions == "labels"
    if type(term) is not Logits or isinstance(unwrapped(term.divergence)[0], nn.Module):
        return False
    taken = term.take, term.teacher_take, term.vocabulary
    return taken == (None, None, None) and term.positions == "labels" and not term.several


def _form(x: Any) -> Any:
    if type(x) is LazyLogits:
        return [(type(y), y.shape, y.dtype, y.device) for y in tensors_of(x)], x.softcap, x.scale
    return (x.shape, x.dtype, x.device) if type(x) is Tensor else type(x)


def _no_features(layer: Any, shape: Any) -> tuple[None, bool]:
    return None, False


def _nothing(name: str, values: Tensor) -> None:
    """A `report` for terms that report nothing themselves."""
