"""The sum of terms, and what it says for all of them."""

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from operator import attrgetter
from types import EllipsisType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._watch import Reminder
from kdloss.balancing import Balance
from kdloss.reduction import Reduction
from kdloss.terms._ahead import Ahead
from kdloss.terms._evaluation import Evaluation
from kdloss.terms._known import Known
from kdloss.terms._loading import told_to_prepare
from kdloss.terms._shares import weighed
from kdloss.terms._teachers import listed, refuse_unread
from kdloss.terms._weight import Weight
from kdloss.terms.contract import Contract, agreed
from kdloss.terms.plan import Plan
from kdloss.terms.term import Term

_log = logging.getLogger("kdloss")


class Sum(nn.Module):
    r"""A criterion: terms, each times its weight, under one contract.

    $\sum_i w_i\,\ell_i$, each term $\ell_i$ reduced over the positions that count.

    Made by arithmetic, `0.1 * kdloss.CrossEntropy() + 0.9 * kdloss.Logits(temperature=4.0)`, or as
    `Sum(*terms, ...)` of terms and sums, to say the contract. Where sums are added the contract of the one that says
    something holds; two different ones are refused. Terms are held as they are, not copied; one twice is refused, and
    so is one name twice. A weight is a number of 0 or more, a function of the step (`kdloss.schedules`), or a tensor
    with one number, which is trained with the student if it is an `nn.Parameter`, or a weighting of teachers by what
    they say (`kdloss.weighting`).

    - `causal`: True holds logits at t against label t+1 (labels are the input's ids, not shifted), False against label
      t. None is False for tensors, what `kdloss.Distiller` measures of the student, and an error for labels of a
      Hugging Face output's logits `[B, T, V]`.
    - `ignore_index`: labels equal to it take a position out of every term.
    - `reduction`: "mean", "sum" or "none", over the positions that count.
    - `balance`: factors beside the weights, so that none of the terms drowns the others: see `kdloss.balancing`.
    - `check_finite`: look at the numbers, at the price of a device sync, and raise for NaN or +inf logits and labels
      out of range at positions that count.
    - `overwrite_logits`: the gradient takes the place of the student's logits (a tensor, not in float16, reduction
      "mean" or "sum"), which then can't be used again.
    - `layout` and `teacher_layout` name the axes of logits whose classes are not last, as "b c h w" of a segmentation
      net: b is the batch, c the classes (else d), all others are positions, in order. The teacher's is the student's
      unless it is given. Labels, mask and values then stand at `[B, H, W]`.

    Called with the student's and the teacher's output (a list of several teachers'), labels and a mask beside them
    (True = keep); see `kdloss.reduce` for `num_items_in_batch`, which divides every term. `attention_mask` (boolean,
    True = a token) takes positions out as `mask` does, and under `causal` those whose logits are padding's out of every
    term but `CrossEntropy` and `Task`, whose label is real. `feature_mask` counts features that stand elsewhere than
    labels, by a term's name where terms differ. `index` says which example of the data set each of the batch is, to
    distances that take it (`kdloss.distances.CRD`). Returns a scalar in float32 or better (one value per position for
    "none"). `components` then holds each term's mean at the positions of the call, detached and without its weight, by
    the term's name.

    Shapes: labels, mask and attention_mask `[...]` where logits are `[..., V]`, or have a layout. Logits of four axes
    and more without one are refused where labels or mask don't show that their classes are last. Labels of another
    shape, like CTC's transcripts, are left to `Task` where no term reads them as classes.

    Raises: ValueError or TypeError for what doesn't fit, saying what to write instead.

    >>> import kdloss
    >>> criterion = 0.5 * kdloss.CrossEntropy() + kdloss.schedules.linear(0.0, 1.0, steps=10) * kdloss.Logits()
    >>> student, teacher = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> criterion(student, teacher, torch.tensor([1, -100])), sorted(criterion.components)
    (tensor(0.6931), ['ce'])
    >>> criterion.advance()  # after optimizer.step()
    >>> criterion(student, teacher, torch.tensor([1, -100])), sorted(criterion.components)
    (tensor(0.6931), ['ce', 'kd'])
    """

    terms: MutableMapping[str, Term]
    weights: MutableMapping[str, Weight]
    balance: Balance | None
    step: int

    def __init__(
        self,
        *terms: "Term | Sum",
        causal: bool | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        check_finite: bool = False,
        overwrite_logits: bool = False,
        layout: str | None = None,
        teacher_layout: str | EllipsisType | None = ...,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        own = Contract(causal, ignore_index, reduction, check_finite, overwrite_logits, layout, teacher_layout)
        own.layouts  # noqa: B018 - raises for patterns that are none
        contract = agreed([own, *(term.contract for term in terms if isinstance(term, Sum))])
        self.causal, self.ignore_index = contract.causal, contract.ignore_index
        self.reduction: Reduction = contract.reduction
        self.check_finite, self.overwrite_logits = contract.check_finite, contract.overwrite_logits
        self.layout, self.teacher_layout = contract.layout, contract.teacher_layout
        self.terms = cast(MutableMapping[str, Term], nn.ModuleDict())
        self.weights = cast(MutableMapping[str, Weight], nn.ModuleDict())
        for term, factors in _flat(terms):
            self._add(term, factors)
        self._hold_weightings()
        self.balance = _balance_of(balance, terms, list(self.terms))
        self.step = max([0, *(term.step for term in terms if isinstance(term, Sum))])
        self.components: dict[str, Tensor] = {}
        self._reminder, self._known = Reminder(), Known()

    @property
    def contract(self) -> Contract:
        """What holds for all terms."""
        return self._contract(self.causal)

    def _contract(self, causal: bool | None) -> Contract:
        return Contract(
            causal,
            self.ignore_index,
            self.reduction,
            self.check_finite,
            self.overwrite_logits,
            self.layout,
            self.teacher_layout,
        )

    @property
    def several(self) -> bool:
        """Whether a term reads several teachers, so that outputs come as a list."""
        return any(map(attrgetter("several"), self.terms.values()))

    @property
    def scheduled(self) -> bool:
        """Whether a weight or anything in a term depends on the step."""
        weights = map(attrgetter("schedules"), self.weights.values())
        return any(weights) or any(map(attrgetter("scheduled"), self.terms.values()))

    def advance(self) -> None:
        """Count one step, after `optimizer.step()`: what is scheduled moves on."""
        self.step += 1
        self._reminder.advanced()

    def check_teachers(self, count: int) -> None:
        """Raise for a teacher, of so many, that no term reads, and for a term whose teacher isn't there."""
        refuse_unread(self, count)

    def plan(self, teachers: int = 1) -> Plan:
        """What this step takes, with so many teachers: terms of weight 0 take nothing."""
        weights, reads, indices = {}, {}, {}
        every = self.weights
        for name, term in self.terms.items():
            weight, several = every[name].at(self.step), term.teachers(teachers)
            if isinstance(weight, Tensor) or weight > 0:
                weights[name], reads[name], indices[name] = weight, term.reads(), several
        weightings = {name: w for name in weights if (w := every[name].weighting) is not None}
        reads |= {name: weighed(reads[name], weighting) for name, weighting in weightings.items()}
        balance = {} if self.balance is None else self.balance.factors(list(weights))
        weights = {name: weight * balance.get(name, 1.0) for name, weight in weights.items()}
        return Plan(weights, reads, indices, self.contract.layouts[0], weightings, balance)

    def plan_of_task(self) -> Plan:
        """What an evaluation without teachers takes: the weighted mean of the terms that read none."""
        alone = {name: term for name, term in self.terms.items() if term.teacher == ()}
        weights = {name: self.weights[name].at(self.step) for name in alone}
        total = sum(weights.values())
        if isinstance(total, Tensor) or total > 0:
            weights = {name: weight / total for name, weight in weights.items()}
        else:
            weights = dict.fromkeys(alone, 1 / max(len(alone), 1))
        reads = {name: term.reads() for name, term in alone.items()}
        return Plan(weights, reads, dict.fromkeys(alone, ()), self.contract.layouts[0])

    def locate(self, student: nn.Module, teachers: Sequence[nn.Module | None]) -> None:
        """Find the blocks that the terms read."""
        for term in self.terms.values():
            term.locate(student, teachers)

    def prepare(self, student: nn.Module, teachers: nn.Module | Sequence[nn.Module | None]) -> "Sum":
        """Find both models' blocks and build the projections; do it before the optimizer.

        `teachers` is a model or a list of some, None for a stored one. Widths are read from Hugging Face
        configurations; `Distiller.prepare(student, **batch)` and `Distillation.prepare(**batch)` measure those of
        other models.
        """
        modules = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        for term in self.terms.values():
            term.prepare(student, modules)
        return self

    def candidates(self, teachers: int = 1) -> Plan:
        """What has to be seen of the models before everything that is trained can be built."""
        reads = {name: r for name, term in self.terms.items() if (r := term.candidates()) is not None}
        return Plan({}, reads, {name: self.terms[name].teachers(teachers) for name in reads})

    def measure(self, name: str, student: Captured, teacher: Captured) -> None:
        """Build what a term trains, for what its candidates were seen to give."""
        self.terms[name].measure(student, teacher)

    def forward(
        self,
        student: Any,
        teacher: Any = None,
        labels: Any = None,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        attention_mask: Bool[Tensor, "..."] | None = None,
        feature_mask: Bool[Tensor, "..."] | Mapping[str, Any] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        index: Int[Tensor, " batch"] | None = None,
        plan: Plan | None = None,
        causal: bool | None = None,
        task_terms: Mapping[str, Tensor] | None = None,
        ahead: Ahead | None = None,
    ) -> Float[Tensor, "..."]:
        """The weighted sum; see the class. The last four are said by whoever ran the models.

        `plan` is that of this step; `causal` holds in place of the sum's own; `task_terms` are numbers that the
        student adds to its cross-entropy, and join it here; `ahead` is how many positions count, where the device was
        asked before the models ran.
        """
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled() and self.scheduled:
            self._reminder.forward(_log)
        contract = self._contract(self.causal if causal is None else causal)
        outputs, count = listed(self, teacher)
        alike = eager and attention_mask is None and feature_mask is None and not task_terms
        known = (self, contract, student, outputs, labels, mask, num_items_in_batch, plan, ahead)
        found = self._known.step(*known) if alike else None
        if found is None:
            plan = self.plan(count) if plan is None else plan
            items, masks = num_items_in_batch, (mask, attention_mask, feature_mask)
            evaluation = Evaluation(self, plan, contract, student, labels, *masks, items, index, ahead)
            for name in plan.complete_with(-1):
                evaluation.reach(name, [] if self.terms[name].several else None)
            for k in range(plan.last_teacher + 1):
                evaluation.taught(k, next(outputs))
            found = evaluation.finish(task_terms or {})
            if self.balance is not None and self.training and torch.is_grad_enabled():
                self.balance.seen({name: found[1][name] for name in plan.balance})
            if alike:
                self._known.learn(evaluation)
        loss, vars(self)["components"] = found  # nn.Module would look for modules in it
        return loss

    def _add(self, term: Term, factors: tuple[Any, ...]) -> None:
        if any(term is other for other in self.terms.values()):
            raise ValueError(f"the term {term.name!r} is in the sum twice; give it once, with the sum of its weights")
        if term.name in self.terms:
            raise ValueError(
                f"two terms are called {term.name!r}; give one a name: {type(term).__name__}(..., name='another')"
            )
        self.terms[term.name], self.weights[term.name] = term, _weight_of(term, factors)

    def _hold_weightings(self) -> None:
        """Each weighting once, however many terms it weighs: what it learns is saved with the sum."""
        every = [weight.weighting for weight in self.weights.values()]
        self.weightings = nn.ModuleList(dict.fromkeys(w for w in every if w is not None))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):  # nn.Module would register a module beside it
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __mul__(self, weight: Any) -> "Sum":
        product = Sum(self)
        for name, old in self.weights.items():
            product.weights[name] = _weight_of(self.terms[name], (weight, *old.factors))
        product._hold_weightings()
        return product

    __rmul__ = __mul__

    def __add__(self, other: Any) -> "Sum":
        if isinstance(other, (Term, Sum)):
            return Sum(self, other)
        return Sum(self) if isinstance(other, int) and other == 0 else NotImplemented  # sum(...) begins with 0

    __radd__ = __add__

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load what was learned, by `nn.Module`'s method and with its `args` and `options`.

        What is in the `state_dict` needs its place: call `prepare` before.
        """
        with told_to_prepare(self, state_dict, "distill.prepare(student, **batch)"):
            return super().load_state_dict(state_dict, *args, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scheduled:
            destination[f"{prefix}step"] = torch.tensor(self.step, device="cpu")  # whatever the default device

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}step"
        if self.scheduled and key not in state_dict and strict:
            missing_keys.append(key)
        step = state_dict.pop(key, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if step is not None:
            self.step = int(step)
            state_dict[key] = step

    def __repr__(self) -> str:
        words = [
            repr(term) if self.weights[name].factors == (1.0,) else f"{self.weights[name]!r} * {term!r}"
            for name, term in self.terms.items()
        ]
        said = [f"{name}={value!r}" for name, value in self.contract.said().items()]
        return f"{type(self).__name__}({', '.join([' + '.join(words), *said])})"


def as_criterion(criterion: Any) -> Any:
    """A term by itself is the sum of it alone; anything else has to be a module."""
    if isinstance(criterion, Term):
        return Sum(criterion)
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"a criterion is a sum of terms, a recipe like kdloss.VanillaKD(), or a module of your own, got "
            f"{type(criterion).__name__}; a function of (student output, labels) is the term kdloss.Task(function)"
        )
    return criterion


def _balance_of(own: Balance | None, parts: Sequence[Any], names: list[str]) -> Balance | None:
    """A sum's own, built for its terms, or that of the sum it is made of."""
    if own is not None and not isinstance(own, Balance):
        raise TypeError(f"balance is a kdloss.balancing.Balance, got {own!r}; write kdloss.balancing.Uncertainty()")
    balanced = [part for part in parts if isinstance(part, Sum) and part.balance is not None]
    if balanced and (own is not None or [*balanced[0].terms] != names):
        raise ValueError(
            "a sum with a balance was added to others, whose terms it doesn't know; say it once, on the whole sum: "
            "kdloss.Sum(*terms, balance=...)"
        )
    if own is not None:
        own.build(names)
    return balanced[0].balance if balanced else own


def _weight_of(term: Term, factors: tuple[Any, ...]) -> Weight:
    weight = Weight(*factors)
    if weight.weighting is not None and (term.several or len(term.teacher) != 1):
        raise ValueError(
            f"{weight.weighting} weighs terms that read one teacher, and {term.name!r} reads "
            f"{'several' if term.teacher else 'none'}; write kdloss.Logits(teacher=0) + kdloss.Logits(teacher=1, "
            "name='second') in place of teacher='all', and terms without a teacher outside of the brackets"
        )
    return weight


def _flat(terms: Sequence[Any]) -> Iterator[tuple[Term, tuple[Any, ...]]]:
    """Terms with the factors of their weights."""
    for term in terms:
        if isinstance(term, Sum):
            yield from ((part, term.weights[name].factors) for name, part in term.terms.items())
        elif isinstance(term, Term):
            yield term, ()
        else:
            raise TypeError(
                f"a sum is made of terms, got {type(term).__name__}; a loss of your own is kdloss.Task(function), or a "
                "module that inherits from kdloss.terms.Term"
            )
