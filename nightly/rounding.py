"""Tolerances: how far a correct result may be from the reference, because of dtypes and rounding.

A value and a row's gradient may be off by 1e-5 of their size in float32 and by 1e-9 in float64. 16-bit inputs are
computed in float32, and their gradients are rounded once. The tolerance is larger where large numbers cancel.
"""

from functools import cached_property
from typing import Any

import numpy as np
import oracles
import torch
from cases import Case, Leaf, Logits, Term

FAR = 1e8
"""Replaces infinity among logits; it is multiplied by a temperature."""
NEAR = 1e-5
"""Rounding may swap the order of probabilities that are closer than this."""
EPS = np.finfo(np.float32).eps


class OfLogits:
    """Tolerances of a term's values and gradients at the rows that count. `here` has both sides, z is the student's."""

    def __init__(self, case: Case, term: Term, here: Any, z: Any, values: Any, further: Any) -> None:
        self.case, self.term, self.here, self.z = case, term, here, z
        self.infinite = ~np.isclose(values, further, rtol=1e-6, atol=1e-6)  # it grows with the replacement of infinity
        self.size = np.where(self.infinite, 0, abs(values))
        self.digits = digits(case, term)
        self.temperature = term.temperature if term.kind == "kd" else 1.0

    def values(self, g: Any, by: Any) -> Any:
        """Tolerances of the values, whose gradients weighted by `by` are g (no numbers at a kink)."""
        g = np.where((by[:, None] == 0) | ~np.isfinite(g), 0, abs(g) / np.maximum(abs(by[:, None]), 1e-300))
        low = abs(self.z - self.z.max(-1, keepdims=True)) * (self.digits > 1e-9)  # low classes lose digits
        found = self.digits * (self.size + self.scale / 10) + (g * (2 * EPS * low + self._capped)).sum(-1)
        found[self._nearly_infinite] = np.inf
        return found

    def slopes(self, g: Any, by: Any) -> Any:
        """Tolerances of the gradients."""
        around = self.digits * (self.size[:, None] + self.scale / 10) + self._capped * self.scale / self.temperature
        by = abs(by[:, None])
        if self.term.function == "dist":  # every value depends on all rows
            by = by.max(initial=0)
        return self.digits * abs(g).max(-1, keepdims=True, initial=0) + by * around / self.temperature

    @property
    def blind(self) -> bool:
        """Whether gradients can't be compared."""
        return bool((self.infinite | self._nearly_infinite).any()) or self._kinked

    @property
    def vague(self) -> bool:
        """Whether rounding decides the value."""
        name = self.term.function
        if name in ("dkd", "nkd"):
            labels = self.here._labels()[:, None] == np.arange(self.z.shape[-1])
            return any(bool((np.where(labels, -np.inf, x).max(-1) < -FAR / 2).any()) for x in self._both(slice(None)))
        for both in self._pairs if name in ("hard_labels", "adaptive_kl") else ():
            p = np.sort(np.exp(oracles.log_softmax(both[1], self.temperature)))[::-1]
            if name == "hard_labels" and len(p) > 1 and p[0] - p[1] < NEAR:
                return True
            if name == "adaptive_kl":
                mass, head = p.cumsum(), self.term.loss.settings["head"]
                last = max(int((mass <= head).sum()), 1)  # the first class of the tail
                if (abs(mass - head) < NEAR).any() or (last < len(p) and p[last - 1] - p[last] < NEAR):
                    return True
        return False

    @cached_property
    def scale(self) -> float:
        """The unit of rounding errors: T², and more where small differences are divided by each other."""
        term = self.term
        if term.kind == "ce":
            return 1.0
        beta = term.loss.settings.get("beta", 8.0 if term.function == "dkd" else 1.0)
        scale = max(1.0, term.temperature**2) * max(1.0, beta)
        if term.function == "jsd" and self.digits > 1e-9:
            scale *= 10  # log(p/q) + log(q/m), of up to 80 each, cancel
        if term.function == "dist":
            scale *= max(1.0, 1 / max(self._varies, 1e-9))
        if term.function.startswith("standardized"):
            scale *= max(1.0, 10 / max(min(x.std(-1).min() for x in self._both(slice(None))), 1e-9))
        return scale

    @property
    def _capped(self) -> float:
        """The rounding error that a soft cap adds to logits."""
        student = self.case.student
        double = student.leaves[0].base.dtype == torch.float64
        return 8 * EPS * student.softcap if student.softcap and not double else 0.0

    def _both(self, i: Any) -> Any:
        return self.here.both(i, self.z)

    @cached_property
    def _pairs(self) -> list[Any]:
        if self.term.kind == "ce":
            return []
        return [both for i in range(len(self.z)) if (both := self._both(i)) is not None]

    @cached_property
    def _varies(self) -> float:
        """The smallest standard deviation of the probabilities that are correlated."""
        p = [np.exp(oracles.log_softmax(x, self.temperature)) for x in self._both(slice(None))]
        axes = (0, 1) if self.term.loss.settings["gamma"] else (1,)
        return float(min(x.std(axis).min(initial=1) for x in p for axis in axes))

    @property
    def _kinked(self) -> bool:
        """Whether rounding decides on which side of a kink the probabilities are."""
        name = self.term.function
        if name == "dist":  # a constant class has no correlation
            return self._varies < 1e-4
        for both in self._pairs if name in ("uld", "total_variation") else ():
            q, p = (np.exp(oracles.log_softmax(x, self.temperature)) for x in both)
            if name == "uld":
                q, p = np.sort(q), np.sort(p)
                if (np.diff(q) < NEAR).any():
                    return True
            if (abs(q - p) < NEAR).any():
                return True
        return False

    @cached_property
    def _nearly_infinite(self) -> Any:
        """Rows where one side excludes a class and the other side gives it a tiny, but not zero, probability."""
        found = np.zeros(len(self.z), bool)
        excluded = (self.z < -FAR / 2).any() or any((t < -FAR / 2).any() for t in self.here.teachers)
        for i in range(len(self.z)) if self.term.kind == "kd" and (excluded or self.here.kept is not None) else ():
            if (both := self._both(i)) is None:
                continue
            gaps = [x - x.max() for x in both]
            gone = [gap < -FAR / 2 for gap in gaps]
            low = [gap * max(1.0, 1 / self.temperature) < -20 for gap in gaps]
            found[i] = any((gone[a] & ~gone[b] & low[b]).any() for a, b in ((0, 1), (1, 0)))
        return found


class OfFeatures:
    """Tolerances of a distance's values and gradients."""

    def __init__(self, case: Case, term: Term) -> None:
        self.term, self.digits = term, 1e-9 if case.hidden[0][0].base.dtype == torch.float64 else 2e-5

    def values(self, values: Any) -> Any:
        """Tolerances of the values."""
        return self.digits * (abs(values) + 1)

    def slopes(self, g: Any, by: Any, features: Any) -> Any:
        """Tolerances of the gradients g with respect to the compared features."""
        scale = 0.1
        if self.term.function == "layer_norm_mse":
            scale = 10 / max(features.std(-1).min(), 1e-9)
        if self.term.function == "cka":  # slopes that cancel to 0 are as large as the features are small
            scale /= min(max(features.std(), 1e-9), 1)
        return np.full_like(g, self.digits * (abs(g).max() + scale * abs(by).max()))

    def projections(self, g: Any, weight: Any) -> Any:
        """Tolerances of a gradient g of the projection; `weight` is the gradient of its weight."""
        return np.full_like(g, 10 * self.digits * (abs(weight).max() + 1))


def digits(case: Case, term: Term) -> float:
    """The relative tolerance of a value."""

    def double(x: Logits) -> bool:
        return x.leaves[0].base.dtype == torch.float64

    own, kept = double(case.student), case.teachers[0].kept
    capped = bool(case.student.softcap) and not own  # capped logits are computed in float32, with its rounding errors
    if term.kind == "ce":
        return 1e-9 if own else 1e-5
    if kept is not None:
        if own and kept.log_probs.dtype == torch.float64:
            return 1e-9
        least = kept.log_probs.nan_to_num(neginf=0).min() if kept.log_probs.numel() else 0.0
        return 1e-5 * max(1, -float(least) / 500)  # gaps of large logarithms
    if isinstance(term.teacher, int):
        teacher = case.teachers[term.teacher]
        capped = capped or (teacher.softcap is not None and not double(teacher))
        return 1e-9 if (own or double(teacher)) and not capped else 1e-5
    largest = max(abs(np.nan_to_num(t.leaves[0].numpy(), posinf=0, neginf=0)).max(initial=0) for t in case.teachers)
    # Large logits lose small gaps; so do small probabilities, which count among the other classes than the label.
    more = max(1, largest / 10) if term.average == "logits" or term.function in ("dkd", "nkd") else 1
    return (1e-9 if all(map(double, case.teachers)) and not capped else 1e-5) * more


def overflows(case: Case, slope: Any) -> bool:
    """Whether a gradient is too large for float16."""
    return any(x.base.dtype == torch.float16 for x in case.student.leaves) and bool((abs(slope) > 3e4).any())


def of_dtype(leaf: Leaf, g: Any) -> Any:
    """The rounding error of a gradient in the dtype of its leaf."""
    info = torch.finfo(leaf.base.dtype)
    return 2 * info.eps * abs(g) + info.smallest_normal * info.eps


def of_head(student: Logits, slope: Any) -> Any:
    """The rounding error of gradients that are multiplied with a head, from its dtype and its soft cap."""
    info = torch.finfo(student.leaves[0].base.dtype)
    return 2 * max(info.eps, 1e-6 if student.softcap else 0) * abs(slope) + info.smallest_normal * info.eps
