"""Let the student learn from its own mistakes: on-policy distillation (GKD).

With probability lambda a step's continuations are sampled by the student itself, else they are the
data's own; the teacher then judges every token of them, and only of them:

    python applications/on_policy.py --lambdas 0 0.5 1 --divergence reverse_kl
    python applications/on_policy.py --teacher my/teacher --student my/student --data texts.jsonl

The student first learns alone, for a student that can't write yet has nothing to learn from its own text
(--start-epochs 0 for one that is given and can). From there it goes on with cross-entropy, as a baseline,
and by distillation for every lambda. Killed at any instant, the same command goes on.

Agarwal et al. 2024, "On-Policy Distillation of Language Models", arXiv:2306.13649.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import distill_lm
import torch
from parts import evaluation, operations, options, report, text
from parts.setup import Setup, prepare, student_of
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Doc

import kdloss

NOTES = f"""\
{distill_lm.NOTES}
What the student does to write is in TFLOP, too: of as many steps as lambda says. All students but the first
begin as the first; losses count at the second half of every block."""


@dataclass(kw_only=True)
class Settings(options.Evaluation, options.Training, options.Student, options.Teacher, options.Text):
    """Those of distill_lm.py that fit, and those of GKD."""

    start_epochs: Annotated[int, Doc("passes of the student alone at first")] = 3
    lambdas: Annotated[list[float], Doc("shares of sampled steps")]
    divergence: Annotated[Literal[tuple(options.DIVERGENCES)], Doc("from the teacher")] = "jsd"
    beta: Annotated[float, Doc("of jsd: 0 is forward, 1 reverse KL")] = 0.5
    temperature: Annotated[float, Doc("of both models' predictions")] = 1.0


DEFAULTS = Settings(output=Path("runs/on_policy"), samples=6000, epochs=4, lambdas=[0.0, 0.5, 1.0])


def divergence(args: Settings) -> Callable[..., Tensor]:
    """The one asked for, with its settings."""
    chosen = getattr(kdloss.divergences, args.divergence)
    return partial(chosen, beta=args.beta) if args.divergence == "jsd" else chosen


class OnPolicy:
    """Stands in the loop of distill_lm.py for a `kdloss.Distiller`: the student may write the text."""

    def __init__(self, distill: kdloss.Distiller, sampled: float) -> None:
        self.distill, self.sampled = distill, sampled
        self.criterion, self.teachers = distill.criterion, distill.teachers

    def prepare(self, student: PreTrainedModel) -> None:
        """What the distiller prepares."""
        self.distill.prepare(student)

    def __call__(self, student: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> kdloss.Distilled:
        """One step; the first half of every block is a prompt, its labels count nowhere."""
        length, prompt = input_ids.shape[1], input_ids.shape[1] // 2
        if torch.rand(()) < self.sampled:
            input_ids = labels = evaluation.sample(student, input_ids[:, :prompt], length)
        labels = labels.clone()
        labels[:, :prompt] = -100
        return self.distill(student, input_ids=input_ids, labels=labels)


def teraflop(loop: OnPolicy, student: PreTrainedModel, steps: int, args: Settings, setup: Setup) -> float:
    """Floating-point operations of training if exactly its share of the steps is sampled, in 10^12."""
    blocks = text.draw(setup.blocks, args.student_blocks, args.seed)
    student.train()

    def if_all(sampled: float) -> float:
        of_one_kind = OnPolicy(loop.distill, sampled)
        batches = text.batches(blocks, args.batch_size, steps, args.seed)
        return operations.of_training(lambda batch: of_one_kind(student, **batch).loss.backward(), batches)

    return (1 - loop.sampled) * if_all(0.0) + loop.sampled * if_all(1.0)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train the start, then from there the baseline and one student for every lambda."""
    args = options.read(DEFAULTS, arguments, __doc__)
    teacher_loss = kdloss.VanillaKD(args.temperature, alpha=0.0, divergence=divergence(args))
    if wrong := [x for x in args.lambdas if not 0 <= x <= 1]:
        raise ValueError(f"--lambdas are shares between 0 and 1, got {wrong}")
    setup = prepare(args, distill_lm.train)
    best = distill_lm.teacher_measured(args, setup)
    kept = args.output / "students"
    plain = options.some(distill_lm.Settings, args, method="none")
    runs: dict[str, list[dict[str, Any]]] = {"teacher": [report.beside(best, best)]}
    if args.start_epochs:
        first = replace(plain, epochs=args.start_epochs, steps=None)
        runs["start"] = [distill_lm.measured(first, setup, name="start", students=kept)]
        plain = replace(plain, keep_blocks=None, student=runs["start"][0]["student"])
    alone = kdloss.Distiller(setup.teacher, kdloss.VanillaKD(alpha=1.0))
    rows = {"cross-entropy goes on": (OnPolicy(alone, 0.0), {})}
    settings = {"divergence": args.divergence, "temperature": args.temperature}
    settings |= {"beta": args.beta} if args.divergence == "jsd" else {}
    distill = kdloss.Distiller(setup.teacher, teacher_loss)
    rows |= {f"lambda {x:g}": (OnPolicy(distill, x), settings | {"lambda": x}) for x in args.lambdas}
    for row, (loop, more) in rows.items():
        name = row.replace(" ", "-")
        runs[row] = [distill_lm.measured(plain, setup, loop, name, students=kept, row=row, **more)]
    for row in [row for row in runs if row != "teacher"]:
        found = runs[row][0]
        if row.startswith("lambda"):  # the batches that were counted were sampled or not by chance
            kept_one = replace(plain, keep_blocks=None, student=found["student"])
            student = student_of(kept_one, setup.teacher, setup.tokenizer)
            found["teraflop"] = teraflop(rows[row][0], student, found["steps"], args, setup)
        against = runs["cross-entropy goes on"][0] if row.startswith("lambda") else None
        runs[row] = [report.beside(found, best, against)]
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
