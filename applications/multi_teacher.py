"""Distil from several teachers: averaged or weighted token by token, compared with each teacher alone and with none.

By default, two small GPT-2s train on one half of the text each, and students learn from one or both:

    python applications/multi_teacher.py --weights 0.5,0.5 0.8,0.2 --by confidence learned
    python applications/multi_teacher.py --several my/first my/second --student my/student

All teachers need the same vocabulary. If the run is killed, the same command resumes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import distill_lm
from parts import models, options, report, setup
from transformers import PreTrainedModel
from typing_extensions import Doc

import kdloss
from kdloss import weighting


def numbers(value: str) -> list[float]:
    """Parse weights, one per teacher: "0.8,0.2"."""
    return [float(part) for part in value.split(",")]


WEIGHTS = options.by(numbers, "W,W", options.joined)


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and the teachers."""

    several: Annotated[list[str], Doc("folders or hub names; otherwise two are trained on half of the text each")]
    weights: Annotated[list[Annotated[list[float], WEIGHTS]], Doc("weights of the teachers; a row for each set")]
    average: Annotated[list[Literal["probabilities", "logits"]], Doc("what to average")]
    by: Annotated[list[Literal["confidence", "entropy", "learned"]], Doc("what weights the teachers at each token")]


DEFAULTS = Settings(
    output=Path("runs/multi_teacher"),
    samples=6000,
    several=[],
    weights=[[0.5, 0.5], [0.8, 0.2]],
    average=["probabilities", "logits"],
    by=["confidence", "entropy", "learned"],
)


def teachers_of(args: Settings) -> tuple[setup.Setup, list[PreTrainedModel]]:
    """The teachers of --several; otherwise one trained on each half of the text, with a common tokenizer."""
    if args.several:
        args.teacher, *others = args.several
        first = setup.prepare(args, distill_lm.train)
        loaded = [models.load(name) for name in others]
        for model, tokenizer in loaded:
            models.check_vocabulary(model, first.teacher, tokenizer, first.tokenizer)
        rest = [model for model, _ in loaded]
    else:
        args.teacher_samples = args.samples // 2
        first = setup.prepare(args, distill_lm.train)
        second_half = first.texts[args.teacher_samples :]
        args.teacher_samples = None
        rest = [setup.teacher_of(args, second_half, distill_lm.train, first.tokenizer)[0]]
    return first, [first.teacher, *(model.to(args.device).eval() for model in rest)]


def weighed(by: str, teachers: int, alpha: float, loss: dict[str, Any]) -> kdloss.Sum:
    """A term for each teacher, weighted at every token."""
    factor = weighting.Learned(teachers) if by == "learned" else getattr(weighting, by)
    terms = [kdloss.Logits(**loss, teacher=k, name=f"kd{k + 1}") for k in range(teachers)]
    return alpha * kdloss.CrossEntropy() + (1 - alpha) * (factor * sum(terms))


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train a student with each teacher, with their averages and with their weightings, and write the results."""
    args = options.read(DEFAULTS, arguments, __doc__)
    count = len(args.several or ("first half", "second half"))
    if any(len(weights) != count for weights in args.weights):
        raise ValueError(f"--weights need one number for each of {count} teachers, not {args.weights}")
    first, teachers = teachers_of(args)
    each = [replace(first, teacher=t, key=f"{first.key} {t.name_or_path}") for t in teachers]
    known = [distill_lm.teacher_measured(args, one) for one in each]
    best = min(known, key=lambda found: found["perplexity"])
    runs = {"teacher": [report.beside(known[0], best)]}
    runs |= {f"teacher {k}": [report.beside(x, best)] for k, x in enumerate(known[1:], start=2)}

    alpha = 0.1 if args.alpha is None else args.alpha
    loss = {"temperature": args.temperature, "alpha": alpha, "divergence": getattr(kdloss.divergences, args.divergence)}
    distillers = {"none": kdloss.Distiller(teachers[0], kdloss.VanillaKD(alpha=1.0))}
    distillers |= {
        f"of-teacher-{k}": kdloss.Distiller(t, kdloss.VanillaKD(**loss)) for k, t in enumerate(teachers, start=1)
    }
    for weights in args.weights:
        for average in args.average:
            several = kdloss.MultiTeacherKD(weights, average=average, **loss)
            name = f"{average}-{'-'.join(map(str, weights))}"
            distillers[name] = kdloss.Distiller(teachers, several)
    loss.pop("alpha")
    for by in args.by:
        distillers[by] = kdloss.Distiller(teachers, weighed(by, count, alpha, loss))

    keys, kept = [one.key for one in each], args.output / "students"
    settings = options.some(distill_lm.Settings, args)  # the other settings do not change a row
    for name, distill in distillers.items():
        found = distill_lm.measured(settings, first, distill, name, students=kept, teachers=keys, row=name)
        alone = runs["none"][0] if "none" in runs else None
        runs[name] = [report.beside(found, best, alone)]
    print(report.write(runs, vars(args), args.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
