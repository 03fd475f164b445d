"""On-policy distillation (GKD): the student samples text, and the teacher scores every token of it.

With probability lambda, the student samples the continuations of a step; otherwise they come from the data. Only the
tokens of the continuations count:

    python applications/on_policy.py --lambdas 0 0.5 1 --divergence reverse_kl
    python applications/on_policy.py --teacher my/teacher --student my/student --data texts.jsonl

The student first trains alone, because an untrained student can't learn from its own text (use --start-epochs 0 with a
--student that is already trained). From there, one student continues with cross-entropy as the baseline, and one
student per lambda is distilled. If the run is killed, the same command resumes it.

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
TFLOP includes the operations of sampling, for the share lambda of the steps. All students start from the row "start".
Losses count only the second half of every block."""


@dataclass(kw_only=True)
class Settings(options.Evaluation, options.Training, options.Student, options.Teacher, options.Text):
    """Most settings of distill_lm.py, and those of GKD."""

    start_epochs: Annotated[int, Doc("epochs of the student alone, before the others")] = 3
    lambdas: Annotated[list[float], Doc("shares of the steps with sampled text; a row for each")]
    divergence: Annotated[Literal[tuple(options.DIVERGENCES)], Doc("divergence from the teacher")] = "jsd"
    beta: Annotated[float, Doc("beta of jsd: 0 is forward KL, 1 is reverse KL")] = 0.5
    temperature: Annotated[float, Doc("divides both models' logits")] = 1.0


DEFAULTS = Settings(output=Path("runs/on_policy"), samples=6000, epochs=4, lambdas=[0.0, 0.5, 1.0])


def divergence(args: Settings) -> Callable[..., Tensor]:
    """The chosen divergence, with its settings."""
    chosen = getattr(kdloss.divergences, args.divergence)
    return partial(chosen, beta=args.beta) if args.divergence == "jsd" else chosen


class OnPolicy:
    """Replaces the `kdloss.Distiller` in the loop of distill_lm.py: the student samples the text of some steps."""

    def __init__(self, distill: kdloss.Distiller, sampled: float) -> None:
        self.distill, self.sampled = distill, sampled
        self.criterion, self.teachers = distill.criterion, distill.teachers

    def prepare(self, student: PreTrainedModel) -> None:
        """Prepare the distiller."""
        self.distill.prepare(student)

    def __call__(self, student: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> kdloss.Distilled:
        """Compute the loss of one step. The first half of every block is the prompt; its labels do not count."""
        length, prompt = input_ids.shape[1], input_ids.shape[1] // 2
        if torch.rand(()) < self.sampled:
            input_ids = labels = evaluation.sample(student, input_ids[:, :prompt], length)
        labels = labels.clone()
        labels[:, :prompt] = -100
        return self.distill(student, input_ids=input_ids, labels=labels)


def teraflop(loop: OnPolicy, student: PreTrainedModel, steps: int, args: Settings, setup: Setup) -> float:
    """Floating-point operations of training in 10^12, if exactly the share lambda of the steps is sampled."""
    blocks = text.draw(setup.blocks, args.student_blocks, args.seed)
    student.train()

    def if_all(sampled: float) -> float:
        of_one_kind = OnPolicy(loop.distill, sampled)
        batches = text.batches(blocks, args.batch_size, steps, args.seed)
        return operations.of_training(lambda batch: of_one_kind(student, **batch).loss.backward(), batches)

    return (1 - loop.sampled) * if_all(0.0) + loop.sampled * if_all(1.0)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train the start, then from there the baseline and one student per lambda."""
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
        if row.startswith("lambda"):  # the counted batches were sampled at random, so count again by lambda
            kept_one = replace(plain, keep_blocks=None, student=found["student"])
            student = student_of(kept_one, setup.teacher, setup.tokenizer)
            found["teraflop"] = teraflop(rows[row][0], student, found["steps"], args, setup)
        against = runs["cross-entropy goes on"][0] if row.startswith("lambda") else None
        runs[row] = [report.beside(found, best, against)]
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
