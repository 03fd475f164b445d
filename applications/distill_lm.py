"""Distil a language model in a plain PyTorch loop, and train the same student without a teacher.

By default, it trains a small GPT-2 on Wikipedia summaries as the teacher, then a smaller student on a small part of
them, for several epochs. Flags set the teacher, the student, the text and everything else:

    python applications/distill_lm.py --teacher my/teacher --keep-blocks auto --data texts.jsonl

If the run is killed, the same command resumes from the last checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from parts import cells, evaluation, memory, models, operations, options, report, text
from parts.checkpoint import Checkpoint
from parts.setup import Setup, prepare, student_of
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

import kdloss

NOTES = """\
Perplexity and ROUGE-L (greedy continuations against the real ones) are measured on texts that no model has seen.
Distinct-2: different pairs of neighbouring tokens among all pairs in the greedy continuations; repetition lowers it.
Samples: the (first) teacher's perplexity on text that a model samples after the same prompts. Own: the model's own
perplexity on that text; it is lower than on real text if the model leaves out much of what could be written.
Retention: the teacher's perplexity divided by the student's. TFLOP: floating-point operations of training in 10^12,
with the teacher's forward passes; products and attention are counted. Seconds: time of training; CPU time with one
thread, wall time with more threads or on a GPU. Train MB: tensors alive at the peak of one training step (weights of
student and teacher, gradients, optimizer state, activations)."""

ELSEWHERE = {"output", "teachers", "save_every", "device"}  # settings that do not change a result
FEATURES = {"layers", "pairing", "distance"}
OUTPUTS = {"temperature", "divergence", "logit_weight"}
UNUSED = {
    "none": FEATURES | OUTPUTS | {"alpha"},
    "vanilla": FEATURES | {"logit_weight"},
    "feature": OUTPUTS,
    "both": set(),
}


@dataclass(kw_only=True)
class Settings(
    options.Evaluation, options.Distillation, options.Training, options.Student, options.Teacher, options.Text
):
    """All settings; each one is a flag."""


DEFAULTS = Settings(output=Path("runs/distill_lm"))


def criterion_for(args: Settings, causal: bool | None = None) -> kdloss.VanillaKD | kdloss.FeatureKD:
    """The loss of a method. With alpha=1 the teacher never runs."""
    if args.method == "none":
        return kdloss.VanillaKD(alpha=1.0, causal=causal)
    divergence = getattr(kdloss.divergences, args.divergence)
    if args.method == "vanilla":
        alpha = 0.1 if args.alpha is None else args.alpha
        return kdloss.VanillaKD(args.temperature, alpha, divergence=divergence, causal=causal)
    explicit = isinstance(args.pairing, list)  # explicit pairs already name the layers
    return kdloss.FeatureKD(
        args.layers or ("auto" if explicit else "last"),
        pairing=args.pairing,
        distance=options.distance(args.distance),
        alpha=0.3 if args.alpha is None else args.alpha,
        temperature=args.temperature,
        divergence=divergence,
        logit_weight=args.logit_weight if args.method == "both" else 0.0,
        causal=causal,
    )


def train(
    distill: kdloss.Distiller,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    perplexity: Callable[[PreTrainedModel], float] | None = None,
    checkpoints: Path | None = None,
    *,
    save_every: float = 60.0,
    points: int = 6,
    title: str = "student",
) -> list[dict[str, float]]:
    """Train the student; return its learning curve. Its seconds do not count evaluation."""
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        "student": student,
        "criterion": distill.criterion,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    checkpoint = Checkpoint(checkpoints, every=save_every, **states)
    done = checkpoint.load() or {"step": 0, "tokens": 0, "seconds": 0.0, "curve": []}

    def measure() -> None:
        """Add a point to the learning curve."""
        reached = {name: done[name] for name in ("step", "tokens", "seconds")}
        done["curve"].append(reached | {"perplexity": perplexity(student)})

    if perplexity is not None and done["step"] == 0:
        measure()
    student.train()
    device = student.device
    rest = islice(batches, done["step"], steps)
    bar = tqdm(rest, title, steps, initial=done["step"], unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, start=done["step"] + 1):
        start = evaluation.clock(device)
        out = distill(student, **batch)  # without a teacher: student(**batch)
        out.loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        done["step"] = step
        done["seconds"] += evaluation.clock(device) - start
        done["tokens"] += batch["input_ids"].numel()
        if step * points // steps > (step - 1) * points // steps:
            shown = {"loss": f"{out.loss.item():.3f}"}
            if perplexity is not None:
                measure()
                shown["held_out"] = f"{done['curve'][-1]['perplexity']:.1f}"
            bar.set_postfix(shown)
        checkpoint.save(step, done)
    return done["curve"]


def fit(
    distill: kdloss.Distiller,
    student: PreTrainedModel,
    args: Settings,
    setup: Setup,
    checkpoints: Path,
    students: Path | None = None,
    title: str = "student",
    batches: Callable[[int], Iterable[dict[str, Tensor]]] | None = None,
) -> dict[str, Any]:
    """Train one student, save it if there is a folder for it, and return its results.

    `batches` is a function from the number of steps to that many batches; by default, blocks of the setup's text.
    """
    distill.prepare(student)
    optimizer = AdamW([*student.parameters(), *distill.criterion.parameters()], lr=args.lr)
    blocks = text.draw(setup.blocks, args.student_blocks, args.seed)
    batches = batches or (lambda count: text.batches(blocks, args.batch_size, count, args.seed))
    steps = args.steps or args.epochs * -(-len(blocks) // args.batch_size)
    curve = train(
        distill,
        student,
        optimizer,
        batches(steps),
        steps,
        partial(evaluation.perplexity, blocks=setup.heldout),
        checkpoints,
        save_every=args.save_every,
        points=args.points,
        title=title,
    )
    if students is not None:
        models.save(student, setup.tokenizer, students)
    batch = next(iter(batches(1)))
    teachers = (
        [teacher.module for teacher in distill.teachers]
        if distill.criterion.plan(len(distill.teachers)).last_teacher >= 0
        else []
    )
    in_use = [student, distill.criterion, *teachers]
    held = memory.held(optimizer, *in_use)
    peak = memory.training_memory(lambda: distill(student, **batch).loss.backward(), held)
    teraflop = operations.of_training(lambda batch: distill(student, **batch).loss.backward(), batches(steps))
    return {**outcome(student, args, setup, curve, steps, peak, teraflop), "student": str(students)}


def outcome(
    student: PreTrainedModel,
    args: Settings,
    setup: Setup,
    curve: list[dict[str, float]],
    steps: int,
    peak: int,
    teraflop: float,
) -> dict[str, Any]:
    """The quality of a trained student and the cost of its training."""
    last = curve[-1]
    return {
        "perplexity": last["perplexity"],
        **evaluation.evaluate(student, setup.tokenizer, setup.prompts, setup.reference, setup.judge),
        "seed": args.seed,
        "steps": steps,
        "teraflop": teraflop,
        "seconds": last["seconds"],
        "trained_tokens_per_second": last["tokens"] / last["seconds"],
        "lowest_perplexity": min(point["perplexity"] for point in curve),
        "training_megabytes": peak / 2**20,
        "curve": curve,
    }


def settings_of(args: Settings, setup: Setup) -> dict[str, Any]:
    """The settings that a student's results depend on, without those that its method does not use."""
    unused = {*ELSEWHERE, *UNUSED[args.method]}
    return {name: value for name, value in vars(args).items() if name not in unused} | {"text": setup.key}


def measured(
    args: Settings,
    setup: Setup,
    distill: kdloss.Distiller | None = None,
    name: str | None = None,
    *,
    students: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The results of the student with these settings; trained now, or read if it was trained earlier.

    It is trained with the method in the settings or with `distill`; then `more` has to name all settings of `distill`.
    """
    name, settings = name or args.method, settings_of(args, setup) | more
    kept = students / f"{name}-{cells.key(settings)}" if students is not None else None

    def work(folder: Path) -> dict[str, Any]:
        student = student_of(args, setup.teacher, setup.tokenizer)
        chosen = distill or kdloss.Distiller(setup.teacher, criterion_for(args))
        return fit(chosen, student, args, setup, folder, kept, f"{name} ({args.seed})")

    return cells.cell(args.output / "cells", name, settings, work, kept)


def teacher_measured(args: Settings, setup: Setup) -> dict[str, Any]:
    """The results of the teacher on the same held-out text."""

    def work(_: Path) -> dict[str, Any]:
        found = evaluation.evaluate(setup.teacher, setup.tokenizer, setup.prompts, setup.reference, setup.judge)
        return found | {"perplexity": evaluation.perplexity(setup.teacher, setup.heldout)}

    settings = {"text": setup.key, "continuations": args.continuations}
    return cells.cell(args.output / "cells", "teacher", settings, work)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train the student alone and with the teacher, and write the results of both."""
    args = options.read(DEFAULTS, arguments, __doc__)
    criterion_for(args)  # refuse invalid settings before a teacher is trained
    setup = prepare(args, train)
    teacher = teacher_measured(args, setup)
    alone = measured(replace(args, method="none"), setup, students=args.output / "students")
    runs = {"teacher": [report.beside(teacher, teacher)], "none": [report.beside(alone, teacher)]}
    if args.method != "none":
        found = measured(args, setup, students=args.output / "students")
        runs[args.method] = [report.beside(found, teacher, alone)]
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
