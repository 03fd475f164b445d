"""`kdloss.Sum`: a weighted sum of terms with shared settings."""

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
from kdloss.terms._placed import refuse_misplaced
from kdloss.terms._shares import weighed
from kdloss.terms._teachers import listed, refuse_unread
from kdloss.terms._weight import Weight
from kdloss.terms.contract import Contract, agreed
from kdloss.terms.plan import Plan
from kdloss.terms.term import Term, WithProperties

_log = logging.getLogger("kdloss")


class Sum(WithProperties):
    r"""A criterion: a weighted sum of terms that share one set of settings.

    $\sum_i w_i\,\ell_i$, each term $\ell_i$ reduced over the positions that count.

    Write it by arithmetic, `0.1 * kdloss.CrossEntropy() + 0.9 * kdloss.Logits(temperature=4.0)`, or as
    `Sum(*terms, ...)` of terms and sums, which also sets the options below for all terms. When sums are added, the
    options of the one that sets any are used; two sums with different options can't be added. Terms are held as they
    are, not copied. The same term twice is refused, and so is the same name twice.

    A weight is a number of 0 or more; a function of the step (`kdloss.schedules`); a tensor with one number, which is
    trained with the student if it is an `nn.Parameter`; or a weighting that compares the teachers' predictions
    (`kdloss.weighting`).

    - `causal`: True compares logits at t with label t+1 (the labels are the input's ids, not shifted), False with label
      t. None means: False for plain tensors; measured on the student by `kdloss.Distiller`; an error for a Hugging Face
      output with logits `[B, T, V]` and labels.
    - `ignore_index`: labels equal to it take a position out of every term.
    - `reduction`: "mean", "sum" or "none", over the positions that count.
    - `balance`: trained or measured factors beside the weights, so that no term outweighs the others: see
      `kdloss.balancing`.
    - `check_finite`: check the numbers, which costs a device sync, and raise for NaN or +inf logits, labels out of
      range, and soft labels that are no probabilities, at positions that count. (Soft labels on a CPU are always
      checked.)
    - `overwrite_logits`: write the gradient into the memory of the student's logits, which then can't be used again
      (criteria and divergences refuse them; PyTorch's own functions would read the gradient).
      The logits must be a tensor, not in float16, and `reduction` "mean" or "sum".
    - `layout` and `teacher_layout`: name the axes of logits whose classes are not last, such as "b c h w" for a
      segmentation network: b is the batch, c the classes (d if there is no c), all other letters are positions, in
      order. Labels, mask and values then have the shape `[B, H, W]`. `teacher_layout` is the same as `layout` unless
      you pass it.

    Call it with the student's and the teacher's output (a list for several teachers) and the labels, and optionally:

    - `mask`: boolean, shaped like the labels, True = keep.
    - `attention_mask`: boolean, True = a token. It takes positions out as `mask` does. With `causal` it also takes out
      positions whose logits belong to padding, except in `CrossEntropy` and `Task`, whose label there is real.
    - `feature_mask`: which features count, for features at other positions than the labels; a dict by term name if
      terms differ.
    - `num_items_in_batch`: divides every term in place of the number of positions; see `kdloss.reduce`.
    - `index`: which example of the data set each example of the batch is, for distances that need it
      (`kdloss.distances.CRD`).

    It returns a scalar in float32 or better ("none": one value per position). `components` then holds each term's mean
    over the positions of this call, by the term's name, detached and without its weight.

    Shapes: labels, mask and attention_mask `[...]` for logits `[..., V]`, at the same positions for all terms. Logits
    `[V]` need a label of shape `[]`. Logits of four or more axes need a layout, unless labels or mask show that their
    classes are last. Labels of another shape, such as CTC's transcripts, are only passed to `Task`, if no term reads
    them as classes.

    Raises: ValueError or TypeError for inputs that don't fit. The message says what to write instead.

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
        own.layouts  # noqa: B018 - raises for invalid patterns
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
        self._turned: set[Any] = set()  # last layers with channels second whose channels came last

    @property
    def contract(self) -> Contract:
        """The settings that all terms share."""
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
        """Whether a term reads several teachers, so that their outputs come as a list."""
        return any(map(attrgetter("several"), self.terms.values()))

    @property
    def scheduled(self) -> bool:
        """Whether a weight, or anything in a term, depends on the step."""
        weights = map(attrgetter("schedules"), self.weights.values())
        return any(weights) or any(map(attrgetter("scheduled"), self.terms.values()))

    def advance(self) -> None:
        """Count one step: schedules move on. Call it after `optimizer.step()`."""
        self.step += 1
        self._reminder.advanced()

    def check_teachers(self, count: int) -> None:
        """Given `count` teachers, raise for one that no term reads and for a term whose teacher is missing."""
        refuse_unread(self, count)

    def plan(self, teachers: int) -> Plan:
        """The terms to compute in this step, with this number of `teachers`; terms of weight 0 are left out."""
        weights: dict[str, float | Tensor] = {}
        balance: Mapping[str, Tensor] = {}
        reads, indices, weightings, every = {}, {}, {}, self.weights
        for name, term in self.terms.items():
            weight, several = every[name].at(self.step), term.teachers(teachers)
            if isinstance(weight, Tensor) or weight > 0:
                weights[name], reads[name], indices[name] = weight, term.reads(), several
                if (weighting := every[name].weighting) is not None:
                    reads[name], weightings[name] = weighed(reads[name], weighting), weighting
        if self.balance is not None:
            balance = self.balance.factors(list(weights))
            weights = {name: weight * balance.get(name, 1.0) for name, weight in weights.items()}
        return Plan(weights, reads, indices, self.contract.layouts[0], weightings, balance)

    def plan_of_task(self) -> Plan:
        """The plan of an evaluation without teachers: the weighted mean of the terms that read no teacher."""
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
        """Find the blocks that the terms read in `student` and `teachers`."""
        for term in self.terms.values():
            term.locate(student, teachers)

    def prepare(self, student: nn.Module, teachers: nn.Module | Sequence[nn.Module | None]) -> "Sum":
        """Find the blocks of `student` and teachers and build the projections; call it before making the optimizer.

        `teachers` is a model or a list of models, None for a stored teacher. Widths are read from Hugging Face
        configurations. For other models `Distiller.prepare(student, **batch)` and `Distillation.prepare(**batch)`
        measure them on a batch.
        """
        alone = isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList)
        modules: list[Any] = [teachers] if alone else list(cast(Sequence[Any], teachers))
        for term in self.terms.values():
            term.prepare(student, modules)
        return self

    def candidates(self, teachers: int = 1) -> Plan:
        """The plan of the pass that captures what is needed to build trained modules, for so many `teachers`."""
        reads = {name: r for name, term in self.terms.items() if (r := term.candidates()) is not None}
        return Plan({}, reads, {name: self.terms[name].teachers(teachers) for name in reads})

    def measure(self, name: str, student: Captured, teacher: Captured) -> None:
        """Build the trained modules of the term `name` for what was captured of `student` and `teacher`."""
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
        """The weighted sum; see the class. The last four arguments come from the code that ran the models.

        `plan` is this step's plan; `causal` replaces the sum's own; `task_terms` are losses that the student adds to
        its cross-entropy, and are added to it here; `ahead` is the number of positions that count, if it was copied
        from the device before the models ran.
        """
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled() and self.scheduled:
            self._reminder.forward(_log)
        contract = self._contract(self.causal if causal is None else causal)
        if attention_mask is not None and plan is None:  # else the code that ran the models has compared them
            for output in teacher if isinstance(teacher, (list, tuple)) else [teacher]:
                refuse_misplaced(output, attention_mask)
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
        """Hold each weighting once, however many terms it weighs, so that the sum saves what it learns."""
        every = [weight.weighting for weight in self.weights.values()]
        self.weightings = nn.ModuleList(dict.fromkeys(w for w in every if w is not None))

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
        """Load learned parameters; `args` and `options` are those of `nn.Module.load_state_dict`.

        Call `prepare` first: the modules whose parameters are in `state_dict` have to exist.
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
    """Turn a single term into a sum; anything else has to be a module."""
    if isinstance(criterion, Term):
        return Sum(criterion)
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"a criterion is a sum of terms, a recipe like kdloss.VanillaKD(), or a module of your own, got "
            f"{type(criterion).__name__}; a function of (student output, labels) is the term kdloss.Task(function)"
        )
    return criterion


def _balance_of(own: Balance | None, operands: Sequence[Any], names: list[str]) -> Balance | None:
    """The balance passed to a sum, built for its terms, or else the balance of the sum that it is made from."""
    if own is not None and not isinstance(own, Balance):
        raise TypeError(f"balance is a kdloss.balancing.Balance, got {own!r}; write kdloss.balancing.Uncertainty()")
    balanced = [sum_ for sum_ in operands if isinstance(sum_, Sum) and sum_.balance is not None]
    if balanced and (own is not None or [*balanced[0].terms] != names):
        raise ValueError(
            "a sum with a balance was added to other terms, and the balance was built without them; say it once, for "
            "all terms: kdloss.Sum(*terms, balance=...)"
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
            "name='second') in place of teacher='all', and add terms without a teacher outside of the brackets"
        )
    return weight


def _flat(terms: Sequence[Any]) -> Iterator[tuple[Term, tuple[Any, ...]]]:
    """Each term with the factors of its weight."""
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
