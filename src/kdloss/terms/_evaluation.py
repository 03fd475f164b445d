"""One step of a sum."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._layout import classes_last
from kdloss.engine import whole_only
from kdloss.engine.task import unwrapped
from kdloss.layers.layer_map import Layer
from kdloss.reduction import precise, takes
from kdloss.targets.kinds import dense
from kdloss.terms._compare import first_feature
from kdloss.terms._feature_masks import FeatureMask, check_given, of_term
from kdloss.terms._outputs import class_indices, find_logits, returned, stand_at
from kdloss.terms._positions import Positions
from kdloss.terms._sweep import Swept, by_logits, check_numbers, look_at_stored, sweep
from kdloss.terms._wheres import Wheres, both
from kdloss.terms.contract import Contract, mean
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.features import Features
from kdloss.terms.logits import Logits
from kdloss.terms.plan import Plan
from kdloss.terms.step import Step


class Evaluation:
    """Terms are reached one after the other, as teachers have run; those on logits wait for one sweep."""

    def __init__(
        self,
        criterion: Any,
        plan: Plan,
        contract: Contract,
        student: Any,
        labels: Any,
        mask: Tensor | None,
        attention_mask: Tensor | None,
        feature_mask: Any,
        items: int | Tensor | None,
        index: Tensor | None,
    ) -> None:
        self.criterion, self.plan, self.contract = criterion, plan, contract
        self.student, self.labels, self.items = student, labels, items
        self.index = index
        self.losses: list[Tensor] = []
        self.means: dict[str, Tensor] = {}
        self.swept: list[Swept] = []
        self.held: dict[str, list[Any]] = {}
        self.logits: dict[Any, Any] = {}
        self.rows: dict[Any, bool] = {}
        self.there: dict[Any, Tensor] = {}
        self.layout, self.teacher_layout = contract.layouts
        if labels is None:
            self._refuse_unlabelled()
        elif contract.causal is None:
            self._refuse_unsaid()
        check_given(feature_mask, dict(criterion.terms.items()))
        self.stood: set[Size] = set()
        self.own = {name: _noted(of_term(name, feature_mask), self.stood) for name in plan.reads}
        if mask is not None and attention_mask is not None:
            _checks.mask(attention_mask, mask.shape, "the positions of mask")
        mask = both(mask, attention_mask)
        there = None if self._labels_are_the_tasks() else class_indices(labels)
        self.known = [x.shape for x in (there, mask) if x is not None]
        shape, classes = self._shape(mask)
        self.by_mask = shape if mask is not None and classes is None and not self.logits else None
        told = [] if classes is not None else self._told_by_features(shape is None)
        if shape is None and told:
            labelled = masked = told[0][1]
        else:
            anywhere = self._any_shape() if shape is None else shape
            labelled = masked = self._positions(anywhere, classes, mask)
            if classes is not None:
                masked = self._positions(anywhere, None, mask)
        told_by = labels if shape is None and isinstance(labels, Tensor) else None
        self.batch = next(iter(shape or (() if told_by is None else told_by.shape)), None)
        self.where = Wheres(labelled, masked, attention_mask)
        counted = self.where.of("mask")
        self.alone = {name: replace(own, keep=both(own.keep, counted.examples(own.shifted))) for name, own in told}

    def taught(self, k: int, output: Any) -> None:
        """Teacher k has run: terms take what they need of its output, and those that have it all are reached."""
        for name in self.plan.of_teacher(k):
            own = self.criterion.terms[name].retain(_view(output, name))
            if isinstance(self.criterion.terms[name], Logits) and self.teacher_layout is not None:
                own = classes_last(own, self.teacher_layout, self.known, "teacher", "teacher_layout")
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

        student, reads = _view(self.student, name), self.plan.reads[name]
        known: dict[str, Any] = {"layout": self.layout, "batch": self.batch, "index": self.index}
        step = Step(student, teacher, self.labels, where, self.own[name], reads, self.criterion.step, report, **known)
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

    def finish(self, task_terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and every component in the order of the terms; what joins cross-entropy last."""
        for group in by_logits(self.swept):
            loss, means = sweep(group, self.where.widest(one.term for one in group), self.contract, self.items)
            self.losses.append(loss)
            self.means |= means
        joined = self._joined(task_terms)
        self.losses += self._untouched()
        found = {
            part: value
            for name in self.plan.weights
            for part, value in self.means.items()
            if part == name or part.startswith(f"{name}/")
        } | joined
        self._check_shapes()
        total = self.losses[0]
        for loss in self.losses[1:]:
            total = total + loss
        return total, found

    def _joined(self, task_terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Numbers that belong to cross-entropy, weighed as it is: each one's mean."""
        names = [name for name in self.plan.weights if isinstance(self.criterion.terms[name], CrossEntropy)]
        if not names:
            return {}
        where, weight = self._where(names[0]), sum(self.plan.weights[name] for name in names)
        self.losses += [weight * self.contract.total(n, v, where, self.items) for n, v in task_terms.items()]
        return {name: mean(value, where) for name, value in task_terms.items()}

    def _check_shapes(self) -> None:
        """Raise for a mask at which nothing stood, and for values of different positions under "none"."""
        logits = find_logits(returned(self.student))
        there = self.stood if logits is None else {*self.stood, self._classes_last(logits)[:-1]}
        if self.by_mask is not None and self.stood and self.by_mask not in there:
            raise ValueError(
                f"mask {tuple(self.by_mask)} fits neither logits nor features, which stand at "
                f"{sorted(map(tuple, there))}; give one entry per position, or write feature_mask=..."
            )
        shapes = {tuple(loss.shape) for loss in self.losses if loss.ndim}
        if len(shapes) > 1:
            raise ValueError(
                f"reduction='none' gives one value per position, and the terms stand at different ones, "
                f"{sorted(shapes)}; write reduction='mean' or 'sum'"
            )

    def _logits(self, term: Any) -> Any:
        """The student's logits that a term reads: the same ones for all that take the same."""
        if term.take not in self.logits:
            given = term.logits(self.student)
            head = self.student.head if isinstance(self.student, Captured) and term.take is None else None
            self.logits[term.take] = classes_last(given, self.layout, self.known, "student", "layout", head)
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
        where = self._where(term.name)
        key = term.take, id(where)
        if key not in self.there:
            self.there[key] = precise(dense(where.take(self._logits(term))))
        return self.there[key]

    def _where(self, name: str) -> Positions:
        return self.alone.get(name) or self.where.of_term(self.criterion.terms[name])

    def _positions(self, shape: Size, classes: Tensor | None, mask: Tensor | None, **other: Any) -> Positions:
        options = {"causal": bool(self.contract.causal), "ignore_index": self.contract.ignore_index} | other
        return Positions.of(shape, classes, mask, **options)

    def _refuse_unlabelled(self) -> None:
        for name, reads in self.plan.reads.items():
            if reads.labels:
                if isinstance(term := self.criterion.terms[name], CrossEntropy):
                    term.logits(self.student)  # what has no logits says more of what is missing
                raise ValueError(
                    f"the term {name!r} needs labels: pass labels=..., or give it weight 0 (alpha=0 in a recipe)"
                )

    def _refuse_unsaid(self) -> None:
        """Labels of a Hugging Face output's logits [B, T, V] may be shifted or not; those of a tensor are beside it."""
        output, labels = returned(self.student), self.labels
        logits = find_logits(output) if hasattr(output, "to_tuple") else None
        if logits is not None and len(logits.shape) == 3 and isinstance(labels, Tensor) and labels.ndim == 2:
            raise ValueError(
                f"{type(output).__name__} has logits {tuple(logits.shape)}, and nothing says whether those at t learn "
                "label t+1 or label t: write causal=True where labels are the input's own ids, causal=False where they "
                "stand beside their logits, or call kdloss.Distiller or kdloss.Distillation, which measure it"
            )

    def _shape(self, mask: Tensor | None) -> tuple[Size | None, Tensor | None]:
        """The positions' shape, that of logits that are read, else of labels or mask; and labels that stand there."""
        logits = next((self._logits(term) for term in self._terms() if isinstance(term, (CrossEntropy, Logits))), None)
        classes = class_indices(self.labels)
        if logits is not None:
            shape = Size(logits.shape[:-1])
            if classes is not None and classes.shape != shape and self._labels_are_the_tasks():
                return shape, None
            if classes is not None:
                _checks.labels(classes, logits)
            return shape, classes
        found = find_logits(returned(self.student))
        if not stand_at(classes, None if found is None else self._classes_last(found)):
            classes = None
        known = classes if classes is not None else mask
        return None if known is None else known.shape, classes

    def _labels_are_the_tasks(self) -> bool:
        """Whether no term reads labels as classes, and one hands them to a loss of the task (CTC's transcripts)."""
        as_classes = any(
            self.plan.reads[t.name].labels or (isinstance(t, Logits) and takes(t.divergence, "labels"))
            for t in self._terms()
        )
        return not as_classes and any(not isinstance(t, (CrossEntropy, Logits, Features)) for t in self._terms())

    def _told_by_features(self, unknown: bool) -> list[tuple[str, Positions]]:
        """Terms whose features stand elsewhere, or all on features where nothing else tells, and their positions."""
        found = []
        for name, reads in self.plan.reads.items():
            axes = getattr(self.criterion.terms[name], "axes", (None,))[0]
            first = None if reads.pairs == () else first_feature(_view(self.student, name), reads, axes)
            if first is None:
                continue
            layer, features = first
            mask, elsewhere = self.own[name](layer, features.shape[:-1])
            if elsewhere or (unknown and features.ndim > 3):
                found.append((name, self._positions(features.shape[:1], None, None, causal=False)))
            elif unknown:
                found.append((name, self._positions(features.shape[:-1], None, mask)))
        return found

    def _any_shape(self) -> Size:
        """The positions' shape where no term tells: that of logits, else of labels."""
        found = find_logits(returned(self.student))
        if found is not None:
            return self._classes_last(found)[:-1]
        return self.labels.shape if isinstance(self.labels, Tensor) else Size(())

    def _classes_last(self, logits: Any) -> Size:
        return Size(logits.shape if self.layout is None else self.layout.shape(logits.shape))

    def _terms(self) -> list[Any]:
        return [self.criterion.terms[name] for name in self.plan.reads]

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


def _noted(own: FeatureMask, stood: set[Size]) -> FeatureMask:
    """The same, which puts down where features stood: there, and at examples, a mask may be."""

    def noted(layer: Layer, shape: Size) -> tuple[Tensor | None, bool]:
        stood.update((shape, shape[:1]))
        return own(layer, shape)

    return noted
