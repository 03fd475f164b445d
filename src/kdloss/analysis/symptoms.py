"""Rules that detect common problems on a curve: the guide's table as code.

A rule reports only differences between the means of the first and the last tenth that exceed two standard errors. If
noise could explain what it sees, it reports nothing.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kdloss.analysis._seen import Numbers, Seen
from kdloss.analysis._trend import LEAST, SURE, Trend
from kdloss.terms import Sum


@dataclass(frozen=True)
class Symptom:
    """A problem that `kdloss.analysis.Curve.symptoms` found.

    - `term`: the name of the term. `text`: the observation, in a sentence.
    - `causes`: likely causes, each with what to do about it.

    >>> print(Symptom("ce", "ce is 0 throughout", {"no position counts": "look at the labels of one batch"}))
    ce is 0 throughout
      - no position counts: look at the labels of one batch
    """

    term: str
    text: str
    causes: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([self.text, *(f"  - {cause}: {cure}" for cause, cure in self.causes.items())])


def find(steps: Numbers, values: Numbers, criterion: Sum | None, teacher_loss: float | None) -> list[Symptom]:
    """Apply all rules. A term that is not finite, or 0, gets no other symptom."""
    seen = Seen(steps, values, criterion)
    broken = [*_not_finite(seen), *_zero(seen)]
    found = [*_features(seen), *_logits(seen), *_labels(seen), *_teacher(seen, teacher_loss), *_drowning(seen)]
    ill = {symptom.term for symptom in broken}
    return [*broken, *(symptom for symptom in found if symptom.term not in ill), *_heldout(seen)]


def _not_finite(seen: Seen) -> Iterator[Symptom]:
    """A value is not finite. One is enough: no loss of this library is NaN by itself."""
    reported = set()
    for name, values in seen.values.items():
        term = name.partition("/")[0]
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None and term not in reported:
            reported.add(term)
            yield Symptom(
                term,
                f"{name} is {values[bad]} at step {seen.steps[name][bad]:g}",
                {
                    "steps too large": "a lower learning rate, a warmup, clipped gradients",
                    "logits or features that are not finite": "Sum(..., check_finite=True) says whose",
                    "a student that rules out (-inf) what its teacher does not": "a bounded divergence, like jsd",
                },
            )


def _zero(seen: Seen) -> Iterator[Symptom]:
    """All of at least 50 values are exactly 0, which a loss between different models never is."""
    nothing = {"no position counts: labels of -100, or a mask of False": "look at the labels of one batch"}
    copy = {"the teacher is the student, or its copy": "another teacher; of a LoRA student kdloss.base_of(student)"}
    for name in seen.kinds:
        values = seen.values.get(name, ())
        if len(values) >= LEAST and not any(values):
            causes = nothing if seen.kinds[name] == "labels" else copy | nothing
            yield Symptom(name, f"{name} is 0 throughout", causes)


def _features(seen: Seen) -> Iterator[Symptom]:
    """A feature term falls by less than 5 %, or by less than 0.4 times the fall of labels or logits (at most 25 %).

    Measured in small trainings (200 steps, five distances, two widths and learning rates, five seeds each): with
    trained projections features fell by at least 0.6 times that. With projections that no optimizer had they fell too,
    because the student learns some of it without: by -8 to 21 % at a fifth of the teacher's width, by up to 28 % at
    half of it, but by 26 to 48 % there under layer_norm_mse and cosine, and by 53 to 67 % in a GPT-2. No curve can
    show that; the warning of the logger "kdloss" does. Layers are reported if they fall by less than 5 % and their
    term by more than 25 %.
    """
    for name, trend in seen.from_the_start("features"):
        learned = seen.learned("labels", "logits")
        limit = max(0.05, min(0.25, 0.4 * max(learned.values(), default=0.0)))
        stuck = [layer for layer, its in seen.layers(name).items() if its.fell_less_than(0.05)]
        if trend.fell_less_than(limit):
            yield Symptom(
                name,
                f"{name} {_course(trend)}{_while(learned)}",
                {
                    "projections that no optimizer has": "AdamW(model.parameters()) of a kdloss.Distillation",
                    "hidden states with outliers, under plain mse": "layer_norm_mse, normalized_mse or cosine",
                    "a weight too small": "a larger one, or Sum(..., balance=kdloss.balancing.RunningMagnitude())",
                },
            )
        elif stuck and trend.sure > 0.25:
            yield Symptom(
                name,
                f"{name} falls, but not at {', '.join(stuck)}",
                {
                    "layers that have little in common": "other pairs: kdloss.analysis.cka_matrix shows which",
                    "layers whose features are small beside the others'": "a distance without scale: layer_norm_mse",
                },
            )


def _logits(seen: Seen) -> Iterator[Symptom]:
    """A logit term falls by less than 5 %. Terms with a scheduled temperature are skipped, since that moves them."""
    for name, trend in seen.from_the_start("logits"):
        if trend.fell_less_than(0.05) and name not in seen.scheduled:
            yield Symptom(
                name,
                f"{name} {_course(trend)}",
                {
                    "T or alpha too high": "T = 1, alpha = 0.1",
                    "a learning rate too low, or so high that nothing is learned": "the best one for the student alone",
                    "a teacher that is given something else": "the same inputs, or kdloss.Teacher(inputs=...)",
                    "a teacher worse than its student, taught by labels": "measure it: symptoms(teacher_loss=...)",
                    "a student too small for this teacher": "a larger student, or a smaller teacher between them",
                },
            )


def _labels(seen: Seen) -> Iterator[Symptom]:
    """Cross-entropy falls by less than 1 % while logits fall by 5 %, or it rises by 5 %.

    The threshold is only 1 %, because a student that starts well has little to gain.
    """
    learned = seen.learned("logits")
    for name, trend in seen.from_the_start("labels"):
        if trend.rose_by(0.05) or (learned and trend.fell_less_than(0.01)):
            yield Symptom(
                name,
                f"{name} {_course(trend)}{_while(learned)}",
                {
                    "labels that weigh too little": "a larger alpha, or Sum(..., balance=...)",
                    "a teacher that disagrees with the labels": "measure it: symptoms(teacher_loss=...)",
                    "labels at other positions than their logits": "causal=True or False; look at one batch",
                    "a learning rate too high": "the best one for the student alone",
                },
            )


def _teacher(seen: Seen, teacher_loss: float | None) -> Iterator[Symptom]:
    """Cross-entropy ends more than 1 % below the teacher's."""
    for name, trend in seen.of("labels").items():
        if teacher_loss is None:
            return
        gap = (teacher_loss - trend.last) / (max(abs(teacher_loss), abs(trend.last)) or 1.0)
        if gap > max(0.01, SURE * trend.error):
            yield Symptom(
                name,
                f"{name} ends at {trend.last:.4g}, and the teacher's is {teacher_loss:.4g}",
                {
                    "a teacher worse than its student": "a better one; until then alpha = 0.9",
                    "a student that memorised its text": "compare both on held-out text; fewer passes",
                },
            )


def _drowning(seen: Seen) -> Iterator[Symptom]:
    """A weighted feature term is more than ten times all other terms, in the first tenth and in the last.

    In the last tenth alone it could be what remains once the others are learned. Weights come from the criterion.
    """
    sizes = seen.sizes()
    for name in seen.of("features"):
        others = [size for other, size in sizes.items() if other != name]
        first, last = (sum(size[i] for size in others) for i in (0, 1))
        if name in sizes and others and sizes[name][0] > 10 * first and sizes[name][1] > 10 * last:
            yield Symptom(
                name,
                f"{name} with its weight is {sizes[name][1]:.3g}, and all others together {last:.3g}",
                {
                    "hidden states with outliers, under plain mse": "layer_norm_mse, normalized_mse or cosine",
                    "a weight too large": "a smaller one, or Sum(..., balance=kdloss.balancing.RunningMagnitude())",
                },
            )


def _heldout(seen: Seen) -> Iterator[Symptom]:
    """Of at least five values the last two are 2 % above the lowest: 6 % in perplexity at a loss of 3."""
    labels = {"loss", *(name for name, kind in seen.kinds.items() if kind == "labels")}
    for name in (f"eval_{name}" for name in sorted(labels)):
        values = seen.values.get(name, ())
        lowest = min(values, default=0.0)
        if len(values) >= 5 and min(values[-2:]) > lowest + 0.02 * abs(lowest):
            yield Symptom(
                name,
                f"{name} was lowest at step {seen.steps[name][values.index(lowest)]:g}: {lowest:.4g}, and ends at "
                f"{values[-1]:.4g}",
                {"text seen too often": "a smaller alpha, fewer passes; keep the checkpoint of the lowest"},
            )


def _course(trend: Trend) -> str:
    word = "rises" if trend.word == "rises" else "hardly falls"
    return f"{word}, from {trend.first:.4g} to {trend.last:.4g}"


def _while(learned: Iterable[str]) -> str:
    return f", while {' and '.join(learned)} learned" if learned else ""
