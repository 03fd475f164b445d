"""The positions of each term in one step, and which of them count."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Size, Tensor

from kdloss import _checks
from kdloss._capture import Captured
from kdloss._layout import Layout
from kdloss.layers.layer_map import Layer
from kdloss.reduction import takes
from kdloss.terms._ahead import Ahead
from kdloss.terms._compare import first_feature
from kdloss.terms._feature_masks import FeatureMask, of_term
from kdloss.terms._outputs import class_indices, find_logits, returned, stand_at
from kdloss.terms._positions import Positions
from kdloss.terms._student import StudentLogits
from kdloss.terms._wheres import Wheres, both
from kdloss.terms.contract import Contract
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.features import Features
from kdloss.terms.logits import Logits
from kdloss.terms.reads import Reads


class Stands:
    """The terms' positions: those of the student's logits, else of labels or mask, else of the features."""

    def __init__(
        self,
        terms: Mapping[str, Any],
        reads: Mapping[str, Reads],
        contract: Contract,
        student: Any,
        labels: Any,
        mask: Tensor | None,
        attention_mask: Tensor | None,
        feature_mask: Any,
        layout: Layout | None,
        ahead: Ahead | None,
        turned: set[Any],
    ) -> None:
        self.terms, self.reads, self.student, self.labels = terms, reads, student, labels
        self.feature_mask, self.layout = feature_mask, layout
        self.stood: set[Size] = set()
        if mask is not None and attention_mask is not None:
            _checks.mask(attention_mask, mask.shape, "the positions of mask")
        mask = both(mask, attention_mask)
        classes = class_indices(labels)
        tasks = self._labels_are_the_tasks()
        known = [x.shape for x in (None if tasks else classes, mask) if x is not None]
        self.logits = StudentLogits(terms.values(), student, labels, known, layout, turned)
        shape, classes = self._shape(classes, mask, tasks)
        self.by_mask = shape if mask is not None and classes is None and not self.logits.terms else None
        self.at = partial(Positions.of, causal=bool(contract.causal), ignore_index=contract.ignore_index)
        told = [] if classes is not None else self._told_by_features(shape is None)
        if shape is None and told:
            labelled = told[0][1]
        else:
            anywhere = self._any_shape() if shape is None else shape
            labelled = self.at(anywhere, classes, mask, ahead=ahead)
        by_mask = (lambda: labelled) if classes is None else partial(self.at, labelled.shape, None, mask)
        told_by = labels.shape if shape is None and isinstance(labels, Tensor) else ()
        self.batch = next(iter(shape or told_by), None)
        self.wheres = Wheres(labelled, by_mask, attention_mask)
        self.alone: dict[str, Positions] = {}
        if told:
            counted = self.wheres.of("mask")
            self.alone = {n: replace(x, keep=both(x.keep, counted.examples(x.shifted))) for n, x in told}

    def where(self, term: Any) -> Positions:
        """A term's positions."""
        return self.alone.get(term.name) or self.wheres.of_term(term)

    def own(self, name: str) -> FeatureMask:
        """The mask of a term's features. It also notes their positions, at which `mask` may stand (see `check`)."""
        return partial(_noted, of_term(name, self.feature_mask), self.stood)

    def check(self) -> None:
        """Raise for a mask that has the positions of neither logits nor features."""
        if self.by_mask is None or not self.stood:
            return
        logits = find_logits(returned(self.student))
        there = self.stood if logits is None else {*self.stood, self._classes_last(logits)[:-1]}
        if self.by_mask not in there:
            raise ValueError(
                f"mask {tuple(self.by_mask)} fits neither logits nor features, which stand at "
                f"{sorted(map(tuple, there))}; give one entry per position, or write feature_mask=..."
            )

    def _shape(self, classes: Tensor | None, mask: Tensor | None, tasks: bool) -> tuple[Size | None, Tensor | None]:
        """The shape of the positions (of read logits, else of labels or mask), and the labels there, if any."""
        if self.logits.terms:
            logits = self.logits.of(self.logits.terms[0])
            shape = Size(logits.shape[:-1])
            if classes is not None and classes.shape != shape and tasks:
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
        """Whether labels go only to a loss of the task and no term reads them as classes (CTC's transcripts)."""
        terms = self.terms.values()
        if all(isinstance(t, (CrossEntropy, Logits, Features)) for t in terms):
            return False
        return not any(
            self.reads[t.name].labels or (isinstance(t, Logits) and takes(t.divergence, "labels")) for t in terms
        )

    def _told_by_features(self, unknown: bool) -> list[tuple[str, Positions]]:
        """Positions of terms whose features stand elsewhere; if `unknown`, of all terms on features."""
        found = []
        for name, reads in self.reads.items():
            axes = getattr(self.terms[name], "axes", (None,))[0]
            first = None if reads.pairs == () else first_feature(view(self.student, name), reads, axes)
            if first is None:
                continue
            layer, features = first
            own, elsewhere = self.own(name)(layer, features.shape[:-1])
            if elsewhere or (unknown and features.ndim > 3):
                found.append((name, self.at(features.shape[:1], None, None, causal=False)))
            elif unknown:
                found.append((name, self.at(features.shape[:-1], None, own)))
        return found

    def _any_shape(self) -> Size:
        """The shape of the positions where no term tells it: that of the logits, else of the labels."""
        found = find_logits(returned(self.student))
        if found is not None:
            return self._classes_last(found)[:-1]
        return self.labels.shape if isinstance(self.labels, Tensor) else Size(())

    def _classes_last(self, logits: Any) -> Size:
        return Size(logits.shape if self.layout is None else self.layout.shape(logits.shape))


def view(output: Any, name: str) -> Any:
    """What was captured for one term, of an output that was captured."""
    return output.of(name) if isinstance(output, Captured) else output


def _noted(own: FeatureMask, stood: set[Size], layer: Layer, shape: Size) -> tuple[Tensor | None, bool]:
    stood.update((shape, shape[:1]))
    return own(layer, shape)


def refuse_unlabelled(terms: Mapping[str, Any], reads: Mapping[str, Reads], student: Any) -> None:
    """Raise if there are no labels and a term needs them."""
    for name, one in reads.items():
        if one.labels:
            if isinstance(term := terms[name], CrossEntropy):
                term.logits(student)  # an output without logits raises a more helpful error
            raise ValueError(
                f"the term {name!r} needs labels: pass labels=..., or give it weight 0 (alpha=0 in a recipe)"
            )


def refuse_unsaid(student: Any, labels: Any) -> None:
    """Raise for a Hugging Face output with logits [B, T, V] and labels: nothing says whether labels are shifted."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return
    output = returned(student)
    logits = find_logits(output) if hasattr(output, "to_tuple") else None
    if logits is not None and len(logits.shape) == 3:
        raise ValueError(
            f"{type(output).__name__} has logits {tuple(logits.shape)}, and nothing says whether those at t learn "
            "label t+1 or label t: write causal=True where labels are the input's own ids, causal=False where they "
            "stand beside their logits, or call kdloss.Distiller or kdloss.Distillation, which measure it"
        )
