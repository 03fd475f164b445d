"""One step of a sum."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._layout import classes_last
from kdloss.engine import TeacherTask
from kdloss.engine.overwritten import refuse
from kdloss.reduction import on_cpu
from kdloss.targets.looks import free_to_look
from kdloss.terms._ahead import Ahead
from kdloss.terms._feature_masks import check_given
from kdloss.terms._outputs import find_logits, head_of, logits_of, returned
from kdloss.terms._positions import Positions
from kdloss.terms._shares import Shares
from kdloss.terms._stands import Stands, refuse_unlabelled, refuse_unsaid, view
from kdloss.terms._sweep import Swept, by_logits, check_numbers, look_at_given, sweep
from kdloss.terms.contract import Contract, mean
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.logits import Logits
from kdloss.terms.plan import Plan
from kdloss.terms.step import Step


class Evaluation:
    """Computes the terms of one step, each as soon as its teachers have run; terms on logits wait for one sweep."""

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
        ahead: Ahead | None,
    ) -> None:
        terms = criterion.terms
        self.terms = {name: terms[name] for name in plan.reads}
        self.criterion, self.plan, self.contract = criterion, plan, contract
        self.student, self.labels, self.items, self.index = student, labels, items, index
        self.losses: list[Tensor] = []
        self.means: dict[str, Tensor] = {}
        self.swept: list[Swept] = []
        self.held: dict[str, dict[int, Any]] = {}
        self.shares = Shares(plan.weightings, plan.teachers)
        self.shared: list[tuple[str, Tensor, Positions]] = []
        self.plain = contract.reduction == "mean" and items is None  # a term's total is its mean
        self.layout, self.teacher_layout = contract.layouts
        if labels is None:
            refuse_unlabelled(self.terms, plan.reads, student)
        elif contract.causal is None:
            refuse_unsaid(student, labels)
        if feature_mask is not None:
            check_given(feature_mask, dict(terms.items()))
        masks = mask, attention_mask, feature_mask
        turned = criterion._turned
        self.stands = Stands(self.terms, plan.reads, contract, student, labels, *masks, self.layout, ahead, turned)

    def taught(self, k: int, output: Any) -> None:
        """Teacher k has run: its terms keep the part that they need, and complete terms are computed."""
        for name in self.plan.of_teacher(k):
            term = self.terms[name]
            own = term.retain(view(output, name))
            if isinstance(term, Logits):
                own = self.stands.logits.taught(term, own, self.teacher_layout, output)
            self.held.setdefault(name, {})[k] = own
        if k in self.shares.teacher.values():
            self._score(k, output)
        del output
        for name in self.plan.complete_with(k):
            held = self.held.pop(name)
            several = [held[k] for k in self.plan.teachers[name]]  # in the order of the weights, not of the passes
            self.reach(name, several if self.terms[name].several else several[0])

    def reach(self, name: str, teacher: Any) -> None:
        """Compute a term, or note it for the sweep."""
        term, weight, logits = self.terms[name], self.plan.weights[name], self.stands.logits
        where = self.stands.where(term)
        means = self.means  # with `self` the step would be in a cycle and keep all features until garbage collection

        def report(name: str, values: Tensor) -> None:
            if not isinstance(values, Tensor):
                raise TypeError(f"a term reports tensors, one value per position or one number, got {values!r}")
            means[name] = mean(values, where)

        step = Step(
            view(self.student, name),
            teacher,
            self.labels,
            where,
            self.stands.own(name),
            self.plan.reads[name],
            self.criterion.step,
            report,
            self.index,
            layout=self.layout,
            teacher_layout=self.teacher_layout,
            batch=self.stands.batch,
        )
        if isinstance(term, (CrossEntropy, Logits)):
            one = Swept(term, weight, step, logits.checked(term, where))
            if logits.by_rows(term):
                self.swept.append(one)
                return
            self._check_plain(one)
            step = replace(step, logits=logits.there(term, where))
        values = term.loss(step)
        if not isinstance(values, Tensor):
            raise _checks.no_tensor(f"the term {name!r}, {term!r},", values)
        if name in self.plan.weightings:
            self.shared.append((name, values, where))
            means[name] = mean(values, where)
            return
        kept = finite_if_off(values, weight)
        total = self.contract.total(name, kept, where, self.items)
        self.losses.append(weight * total)
        means[name] = total.detach() if self.plain and kept is values else mean(values, where)

    def finish(self, task_terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and every component in the order of the terms; the student's added losses come last."""
        self._share()
        for group in by_logits(self.swept):
            widest = self.stands.wheres.widest(one.term for one in group)
            loss, means = sweep(group, widest, self.contract, self.items)
            self.losses.append(loss)
            self.means |= means
        if self.plan.balance:
            self._balance()
        joined = self._joined(task_terms) if task_terms else {}
        self.losses += self._untouched()
        found = {
            part: value
            for name in self.plan.weights
            for part, value in self.means.items()
            if part == name or part.startswith(f"{name}/")
        } | joined
        self.stands.check()
        return self._total(), found

    def _score(self, k: int, output: Any) -> None:
        """Score teacher k for the weightings, on the logits that one of its terms reads, or else on its output's."""
        term = next((t for t in self.terms.values() if isinstance(t, Logits) and t.teacher == (k,)), None)
        if term is not None:
            own = self.held[term.name][k]
        else:
            named = output.classes if isinstance(output, Captured) else None
            own = logits_of(output, "teacher")
            own = own if named is None else named.in_students_order(own)
            if self.teacher_layout is not None:
                known, head = self.stands.logits.known, head_of(output, None)
                own = classes_last(own, self.teacher_layout, known, "teacher", "teacher_layout", head)
        where, student = self.stands.wheres.of("labels"), find_logits(returned(self.student))
        labels = None if torch.compiler.is_compiling() or (term is not None and term.take is not None) else where.labels
        if labels is not None and student is not None and on_cpu(labels.device):  # a bad label is no teacher's fault
            keep = torch.ones_like(labels, dtype=torch.bool) if where.keep is None else where.keep
            shape = student.shape if self.layout is None else self.layout.shape(student.shape)
            _checks.label_range(labels, keep, shape[-1], shift=where.causal)
        rename = None if term is None else getattr(term.vocabulary, "to_teacher", None)
        self.shares.taught(k, own, rename, where)

    def _share(self) -> None:
        """Multiply values by the weightings' shares, which are known once all teachers have run."""
        for one in self.swept:
            one.share = self.shares.of(one.term.name) if one.term.name in self.plan.weightings else None
        for name, values, where in self.shared:
            total = self.contract.total(name, values * self.shares.beside(name, values, where), where, self.items)
            self.losses.append(self.plan.weights[name] * total)
        for name in self.plan.weightings:
            self.means[f"{name}/share"] = mean(self.shares.of(name), self.stands.wheres.of("labels"))

    def _balance(self) -> None:
        """Add the balance's penalty to the loss, reduced like a mean over positions, and report its factors."""
        penalty, where = self.criterion.balance.penalty(list(self.plan.weights)), self.stands.wheres.of("labels")
        if penalty is not None:
            self.losses.append(self.contract.total("balance", penalty, where, self.items))
        self.means |= {f"{name}/balance": factor.detach() for name, factor in self.plan.balance.items()}

    def _joined(self, task_terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the student's own additional losses with the weight of cross-entropy, and give each one's mean."""
        names = [name for name, term in self.terms.items() if isinstance(term, CrossEntropy)]
        if not names:
            return {}
        where, weight = self.stands.where(self.terms[names[0]]), sum(self.plan.weights[name] for name in names)
        self.losses += [weight * self.contract.total(n, v, where, self.items) for n, v in task_terms.items()]
        return {name: mean(value, where) for name, value in task_terms.items()}

    def _total(self) -> Tensor:
        """The sum of all losses; with reduction "none" all of them have to be at the same positions."""
        total, *others = self.losses
        shapes = {tuple(loss.shape) for loss in self.losses if loss.ndim} if others else ()
        if len(shapes) > 1:
            raise ValueError(
                f"reduction='none' gives one value per position, and the terms stand at different ones, "
                f"{sorted(shapes)}; write reduction='mean' or 'sum'"
            )
        for loss in others:
            total = total + loss
        return total

    def _check_plain(self, one: Swept) -> None:
        """The checks that the sweep makes, for a term that is computed outside it."""
        task = one.term.task(one.step, one.step.where.labels)
        task.check(one.logits)
        refuse(one.logits, *([task.teacher] if isinstance(task, TeacherTask) else []))
        look_at_given(one, task, self.contract.check_finite)
        if self.contract.check_finite:
            check_numbers(one, task)
        if self.contract.overwrite_logits and not torch.compiler.is_compiling():
            raise ValueError(
                f"overwrite_logits=True, but the term {one.term.name!r} needs the student's logits as they were; "
                "write overwrite_logits=False"
            )

    def _untouched(self) -> list[Tensor]:
        """Zeros that connect the parameters of terms of weight 0 to the loss, since DDP would wait for their gradients.

        DeepSpeed's ZeRO-3 doesn't wait, and parameters that it shards (`ds_id`) are empty here.
        """
        criterion = self.criterion
        idle = [name for name in criterion.terms if name not in self.plan.weights]
        if self.losses and not idle:
            return []
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


def finite_if_off(values: Tensor, weight: float | Tensor) -> Tensor:
    """A term's values; if its trained weight is 0, those that are infinite or NaN are 0, and none has a slope.

    The slopes would be NaN, too. On an accelerator this isn't looked at, which would make the device wait.
    """
    if not isinstance(weight, Tensor) or not free_to_look(weight, values) or weight.any() or values.isfinite().all():
        return values
    return values.detach().masked_fill(~values.isfinite(), 0)
