"""One step of a sum."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss.engine import whole_only
from kdloss.engine.task import unwrapped
from kdloss.reduction import precise
from kdloss.targets.kinds import dense
from kdloss.terms._compare import example_shape, first_feature
from kdloss.terms._outputs import find_logits, returned
from kdloss.terms._positions import Positions
from kdloss.terms._sweep import Swept, by_logits, check_numbers, look_at_stored, sweep
from kdloss.terms.contract import mean
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.logits import Logits
from kdloss.terms.plan import Plan
from kdloss.terms.step import Step


class Evaluation:
    """Terms are reached one after the other, as teachers have run; those on logits wait for one sweep."""

    def __init__(
        self,
        criterion: Any,
        plan: Plan,
        student: Any,
        labels: Any,
        mask: Tensor | None,
        feature_mask: Any,
        items: int | Tensor | None,
        index: Tensor | None,
    ) -> None:
        self.criterion, self.plan, self.contract = criterion, plan, criterion.contract
        self.student, self.labels, self.feature_mask, self.items = student, labels, feature_mask, items
        self.index = index
        self.losses: list[Tensor] = []
        self.means: dict[str, Tensor] = {}
        self.swept: list[Swept] = []
        self.held: dict[str, list[Any]] = {}
        self.logits: dict[Any, Any] = {}
        self.rows: dict[Any, bool] = {}
        self.there: dict[Any, Tensor] = {}
        if labels is None:
            self._refuse_unlabelled()
        shape = self._shape(mask)
        options: dict[str, Any] = {"causal": bool(self.contract.causal), "ignore_index": self.contract.ignore_index}
        labelled = Positions.of(shape, labels if isinstance(labels, Tensor) else None, mask, **options)
        alike = labelled.labels is None
        masked = labelled if alike else Positions.of(shape, None, mask, **options)
        self.where = {"labels": labelled, "mask": masked}

    def taught(self, k: int, output: Any) -> None:
        """Teacher k has run: terms take what they need of its output, and those that have it all are reached."""
        for name in self.plan.of_teacher(k):
            own = self.criterion.terms[name].retain(_view(output, name))
            self.held.setdefault(name, []).append(own)
        del output
        for name in self.plan.complete_with(k):
            held = self.held.pop(name)
            self.reach(name, held if self.criterion.terms[name].several else held[0])

    def reach(self, name: str, teacher: Any) -> None:
        """Compute a term, or put it down for the sweep."""
        term, weight, where = self.criterion.terms[name], self.plan.weights[name], self._where(name)
        means = self.means  # by `self` a step would hold itself, and all features, until garbage is collected

        def report(name: str, values: Tensor) -> None:
            means[name] = mean(values, where)

        own_mask = self.feature_mask
        if isinstance(own_mask, Mapping):
            own_mask = own_mask.get(name)
        student, reads = _view(self.student, name), self.plan.reads[name]
        step = Step(student, teacher, self.labels, where, own_mask, reads, self.criterion.step, report, self.index)
        if isinstance(term, (CrossEntropy, Logits)):
            one = Swept(term, weight, step, self._logits(term))
            if _as_given(term) and self._by_rows(term):
                self.swept.append(one)
                return
            self._check_plain(one)
            step = replace(step, logits=self._there(term))
        values = term.loss(step)
        self.losses.append(weight * self.contract.total(name, values, where, self.items))
        report(name, values)

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and every component in the order of the terms."""
        for group in by_logits(self.swept):
            loss, means = sweep(group, self.contract, self.items)
            self.losses.append(loss)
            self.means |= means
        self.losses += self._untouched()
        found = {
            part: value
            for name in self.plan.weights
            for part, value in self.means.items()
            if part == name or part.startswith(f"{name}/")
        }
        total = self.losses[0]
        for loss in self.losses[1:]:
            total = total + loss
        return total, found

    def _logits(self, term: Any) -> Any:
        """The student's logits that a term reads: the same ones for all that take the same."""
        if term.take not in self.logits:
            self.logits[term.take] = term.logits(self.student)
        logits = self.logits[term.take]
        if isinstance(term, CrossEntropy) and _as_given(term):
            _checks.one_class(term.name, logits, self.labels)
        elif isinstance(term, Logits) and not getattr(unwrapped(term.divergence)[0], "one_class", True):
            _checks.one_class(term.name, logits)
        return logits

    def _by_rows(self, term: Any) -> bool:
        """Whether it goes some rows at a time; where one of those that read the same logits can't, none does."""
        if term.take not in self.rows:
            every = (self.criterion.terms[name] for name in self.plan.reads)
            alike = [t for t in every if isinstance(t, (CrossEntropy, Logits)) and t.take == term.take]
            logits = self._logits(term)
            self.rows[term.take] = not any(whole_only(logits, getattr(t, "divergence", None)) for t in alike)
        return self.rows[term.take]

    def _there(self, term: Any) -> Tensor:
        """Its logits at the positions, in float32 or better: shared, so that gradients meet before they are rounded."""
        key = term.take, term.positions
        if key not in self.there:
            self.there[key] = precise(dense(self.where[term.positions].take(self._logits(term))))
        return self.there[key]

    def _where(self, name: str) -> Positions:
        return self.where[self.criterion.terms[name].positions]

    def _refuse_unlabelled(self) -> None:
        for name, reads in self.plan.reads.items():
            if reads.labels:
                raise ValueError(
                    f"the term {name!r} needs labels: pass labels=..., or give it weight 0 (alpha=0 in a recipe)"
                )

    def _shape(self, mask: Tensor | None) -> Size:
        """The positions' shape: that of the logits that are read, else of labels, mask, features, or logits."""
        labels = self.labels if isinstance(self.labels, Tensor) else None
        indices = labels if labels is not None and not labels.is_floating_point() else None
        for name in self.plan.reads:
            term = self.criterion.terms[name]
            if isinstance(term, (CrossEntropy, Logits)):
                logits = self._logits(term)
                if indices is not None:
                    _checks.labels(indices, logits)
                return Size(logits.shape[:-1])
        known = indices if indices is not None else mask
        if known is not None:
            return known.shape
        for name, reads in self.plan.reads.items():
            features = first_feature(_view(self.student, name), reads)
            if features is not None:
                own = self.feature_mask
                own = own.get(name) if isinstance(own, Mapping) else own
                return example_shape(features, own)
        found = find_logits(returned(self.student))
        if found is not None:
            return Size(found.shape[:-1])
        return Size(()) if labels is None else labels.shape

    def _check_plain(self, one: Swept) -> None:
        """What the sweep checks of its terms, for one that is computed by itself."""
        task = one.term.task(one.step, one.step.where.labels)
        task.check(one.logits)
        look_at_stored(one, task, self.contract.check_finite)
        if self.contract.check_finite:
            check_numbers(one, task)
        if self.contract.overwrite_logits and not torch.compiler.is_compiling():
            raise ValueError(
                f"overwrite_logits=True, but the term {one.term.name!r} needs the student's logits as they were; "
                "write overwrite_logits=False"
            )

    def _untouched(self) -> list[Tensor]:
        """Zeros that lead to the parameters of terms without weight, for which DDP would wait.

        DeepSpeed's ZeRO-3 waits for none, and what it has in shards (`ds_id`) is empty here.
        """
        criterion = self.criterion
        idle = [name for name in criterion.terms if name not in self.plan.weights]
        if not torch.is_grad_enabled():
            idle = []
        dtype = self.losses[0].dtype if self.losses else torch.float32
        zeros = [
            parameter.flatten()[:0].sum().to(dtype)
            for name in idle
            for module in (criterion.terms[name], criterion.weights[name])
            for parameter in module.parameters()
            if parameter.requires_grad and not hasattr(parameter, "ds_id")
        ]
        if self.losses or zeros:
            return zeros
        logits: Any = find_logits(returned(self.student))
        logits = getattr(logits, "hidden", logits)
        return [torch.zeros(()) if logits is None else logits.flatten()[:0].sum()]


def _view(output: Any, name: str) -> Any:
    """What was captured for a term."""
    return output.of(name) if isinstance(output, Captured) else output


def _as_given(term: CrossEntropy | Logits) -> bool:
    """Whether the engine computes the same as its `loss`: a subclass may have another."""
    return type(term).loss in (CrossEntropy.loss, Logits.loss)
