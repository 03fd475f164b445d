"""The expected result of a case, in float64 numpy from the formulas: its value, its components and all gradients.

The formulas of losses are those of tests/oracles.py. This file implements the rest a second time, without kdloss: which
positions count, the tail of a top-k teacher, averages of teachers, reductions, and the gradients of hidden states,
heads and projections. The tolerances are in rounding.py.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import rounding
import torch
from cases import Case, Leaf, Logits, Term
from rounding import FAR, OfFeatures, OfLogits

from kdloss import TokenMap


@dataclass
class Expected:
    """Values (one number, or one per position) and the gradient of each leaf, each with its tolerance.

    `blind`: gradients can't be compared, because a value is infinite or rounding decides the side of a kink. `vague`:
    the value can't be compared, because rounding decides it.
    """

    value: Any
    value_tolerance: Any
    gradients: list[Any] = field(default_factory=list)
    tolerances: list[Any] = field(default_factory=list)
    components: dict[str, tuple[float, float]] = field(default_factory=dict)
    blind: bool = False
    vague: bool = False


def dense(logits: Logits, far: float = FAR) -> Any:
    """Logits `[P, V]` with a finite number in place of -inf."""
    if not logits.lazy:
        z = logits.leaves[0].numpy()
        z = z.reshape(-1, z.shape[-1])
        return np.where(np.isneginf(z), -far, z)
    hidden, weight, *bias = (leaf.numpy() for leaf in logits.leaves)
    z = logits.scale * (hidden.reshape(-1, hidden.shape[-1]) @ weight.T + (bias[0] if bias else 0))
    return z if logits.softcap is None else logits.softcap * np.tanh(z / logits.softcap)


def average(term: Term, teachers: list[Any]) -> Any:
    """The teacher's logits, or the average of several teachers at the term's temperature."""
    if isinstance(term.teacher, int):
        return teachers[term.teacher]
    chosen = teachers if term.teacher == "all" else [teachers[k] for k in term.teacher]
    shares = term.weights or [1 / len(chosen)] * len(chosen)
    if term.average == "logits":
        return sum(w * t for w, t in zip(shares, chosen, strict=True))
    logs = [oracles.log_softmax(t, term.temperature) + np.log(w) for w, t in zip(shares, chosen, strict=True) if w > 0]
    return term.temperature * np.logaddexp.reduce(logs)


def shared(vocabulary: Any, classes: int, theirs: int) -> tuple[Any, Any]:
    """The classes that both sides have, by their ids on each side."""
    if isinstance(vocabulary, TokenMap):
        return vocabulary.student_ids.numpy(), vocabulary.teacher_ids.numpy()
    both = np.arange(min(classes, theirs))
    return both, both


def few(kept: Any, row: int, z: Any, vocabulary: Any) -> tuple[Any, Any] | None:
    """One row of both sides over the classes left by a top-k teacher's tail; None if it has no known class."""
    k, at = kept.shape[-1], kept.temperature
    ids, log_p = kept.indices.reshape(-1, k)[row].tolist(), kept.log_probs.double().numpy().reshape(-1, k)[row]
    told = {i: x for i, x in zip(ids, log_p, strict=True) if i >= 0}
    if kept.log_rest is not None:
        rest = kept.log_rest.double().numpy().reshape(-1)[row]
    else:  # rounding hides whether the rest is 0
        least = torch.finfo(torch.promote_types(kept.log_probs.dtype, torch.float32)).eps
        rest = np.log(max(1 - np.exp(list(told.values())).sum(), least))
    mine, theirs = shared(vocabulary, len(z), kept.vocabulary)
    z, new = z[mine], {old: i for i, old in enumerate(theirs.tolist())}
    told = {new[i]: x for i, x in told.items() if i in new}
    if not told:
        return None
    there, t = list(told), at * np.array(list(told.values()))
    others, rest = np.setdiff1d(np.arange(len(z)), there), max(rest, -FAR)
    if kept.tail == "uniform":
        full = np.full(len(z), at * (rest - np.log(max(len(others), 1))))
        full[there] = t
        return z, full
    if kept.tail == "renormalise" or not len(others):
        return z[there], t
    top = z[others].real.max()
    bucket = top + at * np.log(np.exp((z[others] - top) / at).sum())
    return np.append(z[there], bucket), np.append(t, at * rest)


class OnLogits:
    """A term on logits: a function from the student's logits at the rows that count to the values there."""

    def __init__(self, case: Case, term: Term, far: float = FAR) -> None:
        self.case, self.term = case, term
        self.rows, self.labels = case.counted(term)
        self.kept = case.teachers[0].kept
        self.teachers = [dense(t, far) for t in case.teachers if t.kept is None]

    def __call__(self, z: Any) -> Any:
        term, settings = self.term, {} if self.term.loss is None else dict(self.term.loss.settings)
        if term.kind == "ce":
            y = self._labels()
            weight = None if term.class_weights is None else term.class_weights.double().numpy()
            return oracles.cross_entropy(z, y, term.smoothing, weight)
        if term.loss.labelled:
            settings["labels"] = self._labels()
        if self.kept is None:
            return term.loss.oracle(*self.both(slice(None), z), **settings)
        values = np.zeros(len(z), dtype=z.dtype)
        for i in range(len(z)):
            both = self.both(i, z)
            values[i] = 0 if both is None else term.loss.oracle(both[0][None], both[1][None], **settings)[0]
        return values

    def both(self, i: Any, z: Any) -> tuple[Any, Any] | None:
        """The student's and the teacher's logits at rows i of those that count."""
        if self.kept is not None:
            return few(self.kept, self.rows[i], z[i], self.term.vocabulary)
        mine, theirs = shared(self.term.vocabulary, z.shape[-1], self.teachers[0].shape[-1])
        return z[i][..., mine], average(self.term, [t[self.rows[i]][..., theirs] for t in self.teachers])

    def slope(self, z: Any, by: Any) -> Any:
        """The gradient of the values' sum weighted by `by`."""
        independent = self.term.loss is None or "relational" not in self.term.loss.exempt
        return oracles.gradient(lambda x: by * self(x), z, positions_apart=independent)

    def _labels(self) -> Any:
        labels = self.case.labels
        labels = labels.double() if labels.is_floating_point() else labels
        return labels.reshape(-1, *labels.shape[len(self.case.shape) :]).numpy()[self.labels]


def expected(case: Case) -> Expected:
    """The expected result of this case."""
    with np.errstate(all="ignore"):
        return _expected(case)


def _expected(case: Case) -> Expected:
    warmest = max([1.0, *(term.temperature for term in case.terms)])
    z, positions = dense(case.student, FAR * warmest), int(np.prod(case.shape))
    upstream = np.zeros(positions)
    upstream[case.stands] = case.upstream
    values, value_tolerance = np.zeros(positions), np.zeros(positions)
    slope, slope_tolerance = np.zeros_like(z), np.zeros_like(z)
    found, features, learned = Expected(0, 0), [], []
    apart = any("relational" in term.loss.exempt for term in case.kds)  # gradients are rounded, then added
    for term in case.terms:
        rows = case.counted(term)[0]
        one = 1 / ((case.items or max(len(rows), 1)) if case.reduction == "mean" else 1)
        share = term.weight * one
        by = share * upstream[rows]
        if term.kind == "feature":
            v, features = _on_features(case, term, rows, by)
            tolerance = OfFeatures(case, term).values(v)
        elif len(rows):
            here, twice = OnLogits(case, term, FAR * warmest), OnLogits(case, term, 2 * FAR * warmest)
            own = z[rows]
            v, g = here(own), here.slope(own, by) if term.weight else np.zeros_like(own)
            of = OfLogits(case, term, here, own, v, twice(dense(case.student, 2 * FAR * warmest)[rows]))
            found.blind, found.vague = found.blind or of.blind, found.vague or of.vague
            v, tolerance, g_tolerance = np.where(of.infinite, np.inf, v), of.values(g, by), of.slopes(g, by)
            slope[rows] += g
            slope_tolerance[rows] += g_tolerance + (rounding.of_dtype(case.student.leaves[0], g) if apart else 0)
        else:
            v, tolerance = np.zeros(0), np.zeros(0)
        n = max(len(rows), 1)
        found.components[term.name] = v.sum() / n, tolerance.sum() / n
        if term.weight:
            values[rows] += share * v
            value_tolerance[rows] += share * tolerance
        if term.learned:
            by = one * upstream[rows]
            learned.append(((by * v).sum(), (abs(by) * (tolerance + 1e-6 * abs(v))).sum()))
    found.blind = found.blind or rounding.overflows(case, slope)
    found.gradients, found.tolerances = _of_student(case.student, slope, slope_tolerance)
    found.gradients += [g for g, _ in (*features, *learned)]
    found.tolerances += [tolerance for _, tolerance in (*features, *learned)]
    none = case.reduction == "none"
    found.value = values[case.stands] if none else values.sum()
    found.value_tolerance = value_tolerance[case.stands] if none else value_tolerance.sum()
    return found


def back(leaf: Leaf, g: Any) -> Any:
    """Turn a gradient of the view into one of the leaf."""
    base = leaf.base.detach().double().requires_grad_()
    seen = leaf.view(base)
    return torch.autograd.grad(seen, base, torch.as_tensor(np.array(g)).reshape(seen.shape))[0].numpy()


def of_leaf(leaf: Leaf, g: Any, tolerance: Any) -> tuple[Any, Any]:
    """The gradient and the tolerance of the leaf."""
    return back(leaf, g), back(leaf, tolerance + rounding.of_dtype(leaf, g))


def _of_student(student: Logits, slope: Any, tolerance: Any) -> tuple[list[Any], list[Any]]:
    """The gradients and tolerances of the student's leaves."""
    if not student.lazy:
        g, spread = of_leaf(student.leaves[0], slope, tolerance)
        return [g], [spread]
    hidden, weight, *bias = (leaf.numpy() for leaf in student.leaves)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    factor: Any = student.scale
    if student.softcap is not None:
        raw = student.scale * (hidden @ weight.T + (bias[0] if bias else 0))
        factor = factor / np.cosh(raw / student.softcap) ** 2
    tolerance = tolerance * factor + rounding.of_head(student, slope * student.scale)
    slope = slope * factor
    gradients = slope @ weight, slope.T @ hidden, slope.sum(0)
    spreads = tolerance @ abs(weight), tolerance.T @ abs(hidden), tolerance.sum(0)
    found = [of_leaf(*three) for three in zip(student.leaves, gradients, spreads, strict=False)]
    return [g for g, _ in found], [spread for _, spread in found]


def _on_features(case: Case, term: Term, rows: Any, by: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """Values at the rows that count; gradients of hidden states and projections with their tolerances."""
    exempt, of = term.loss.exempt, OfFeatures(case, term)
    groups, per_example = [np.arange(len(rows))], int(np.prod(case.shape[1:]))
    if "relational" in exempt and "batch" not in exempt and len(case.shape) > 1:
        groups = [np.flatnonzero(rows // max(per_example, 1) == b) for b in range(case.shape[0])]
    values, found, projected = np.zeros(len(rows)), [], []
    for layer, leaf in enumerate(case.hidden[0]):
        h, t = (x.reshape(int(np.prod(case.shape)), x.shape[-1]) for x in (side[layer].numpy() for side in case.hidden))
        g, spread = np.zeros_like(h), np.zeros_like(h)
        weight, bias = (np.eye(h.shape[-1]), 0) if term.projection is None else (x.numpy() for x in term.projection)
        g_weight, g_bias = np.zeros_like(weight), np.zeros(len(weight))
        for group in groups if 1 <= layer <= term.pairs else ():
            if not len(group):
                continue
            at = rows[group]

            def one(x: Any, group: Any = group, at: Any = at, t: Any = t) -> Any:
                return term.loss.oracle(x, t[at], **term.loss.settings) / term.pairs

            s = h[at] @ weight.T + bias
            values[group] += one(s)
            own = oracles.gradient(lambda x, one=one, group=group: by[group] * one(x), s, "relational" not in exempt)
            g[at], spread[at] = own @ weight, of.slopes(own, by[group], s) @ abs(weight)
            g_weight, g_bias = g_weight + own.T @ h[at], g_bias + own.sum(0)
        found.append(of_leaf(leaf, g, spread))
        if term.projection is not None and 1 <= layer <= term.pairs:
            projected += [(x, of.projections(x, g_weight)) for x in (g_weight, g_bias)]
    return values, found + projected
