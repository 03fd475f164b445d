"""Distil a language model in a plain PyTorch loop, beside the same student trained alone.

As it stands, it trains a small GPT-2 on Wikipedia summaries, and a smaller one that sees a small
part of them again and again. By flags, teacher, student, text and everything else are yours:

    python examples/distill_lm.py --teacher my/teacher --keep-blocks auto --data texts.jsonl

Killed at any instant, the same command goes on from its last checkpoint.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from parts import cells, evaluation, memory, models, options, report, text
from parts.checkpoint import Checkpoint
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

import kdloss

NOTES = """\
Perplexity and ROUGE-L (greedy continuations against the real ones) on texts no model has seen.
Retention: the teacher's perplexity over the student's. CPU seconds and tokens/s count the time of
all cores together, evaluation left out. Train MB: tensors alive at the peak of one training step
(weights of student and teacher, gradients, optimizer state, activations)."""

FEATURES = {"layers", "pairing", "distance"}
OUTPUTS = {"temperature", "logit_weight"}
UNUSED = {
    "none": FEATURES | OUTPUTS | {"alpha"},
    "vanilla": FEATURES | {"logit_weight"},
    "feature": OUTPUTS,
    "both": set(),
}


def criterion_for(args: argparse.Namespace) -> kdloss.VanillaKD | kdloss.FeatureKD:
    """The loss of a method; with alpha=1 no teacher is run at all."""
    if args.method == "none":
        return kdloss.VanillaKD(alpha=1.0)
    if args.method == "vanilla":
        return kdloss.VanillaKD(args.temperature, 0.1 if args.alpha is None else args.alpha)
    explicit = isinstance(args.pairing, list)  # pairs of layers leave no layers to choose
    return kdloss.FeatureKD(
        args.layers or ("auto" if explicit else "last"),
        pairing=args.pairing,
        distance=getattr(kdloss, args.distance),
        alpha=0.3 if args.alpha is None else args.alpha,
        temperature=args.temperature,
        logit_weight=args.logit_weight if args.method == "both" else 0.0,
    )


def train(
    distill: kdloss.Distiller,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    perplexity: Callable[[PreTrainedModel], float],
    checkpoint: Checkpoint | None = None,
    *,
    points: int = 6,
    title: str = "student",
) -> list[dict[str, float]]:
    """Train the student; returns its learning curve, the seconds without those of evaluation."""
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoint = checkpoint or Checkpoint(None)
    checkpoint.parts = {
        "student": student,
        "criterion": distill.criterion,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    done = checkpoint.load()
    if done is None:
        start = {"step": 0, "tokens": 0, "seconds": 0.0, "perplexity": perplexity(student)}
        done = {"step": 0, "tokens": 0, "seconds": 0.0, "curve": [start]}
    student.train()
    device, curve = student.device, done["curve"]
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
            reached = {name: done[name] for name in ("step", "tokens", "seconds")}
            curve.append(reached | {"perplexity": perplexity(student)})
            bar.set_postfix(loss=f"{out.loss.item():.3f}", held_out=f"{curve[-1]['perplexity']:.1f}")
        checkpoint.save(step, done)
    return curve


@dataclass
class Setup:
    """What a student is trained and measured on."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    heldout: Tensor
    prompts: Tensor
    reference: Tensor
    key: str


def prepare(args: argparse.Namespace) -> Setup:
    """Read the text, get the teacher, cut the text into blocks and hold some of it out."""
    source = {"config": args.data_config, "split": args.split, "column": args.text_column}
    texts = text.read_texts(args.data, **source, limit=args.samples)
    seen, heldout = texts[: -args.heldout_samples], texts[-args.heldout_samples :]
    if not seen:
        raise ValueError(
            f"all {len(texts)} texts are held out, none is left to train on: --heldout-samples"
        )
    teacher, tokenizer = teacher_of(args, seen)
    models.check_length(teacher, args.max_length, "teacher")
    student_samples = args.student_samples or (len(seen) if args.teacher else 320)
    blocks = text.pack(text.tokenize(tokenizer, seen[:student_samples]), args.max_length)
    token_ids = text.tokenize(tokenizer, heldout)
    prompts, reference = evaluation.continuations(token_ids, args.continuations, args.max_length)
    unseen = text.pack(token_ids, args.max_length)
    made_of = {"teacher": str(teacher.name_or_path), "blocks": blocks.tolist(), "heldout": token_ids}
    teacher.to(args.device).eval()
    return Setup(teacher, tokenizer, blocks.to(args.device), unseen, prompts, reference, cells.key(made_of))


def teacher_of(
    args: argparse.Namespace, texts: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher asked for; else one trained on these texts, kept for the next time."""
    if args.teacher is not None:
        return models.load(args.teacher)
    texts = texts[: args.teacher_samples]
    names = ("vocabulary", "max_length", "batch_size", *(n for n in vars(args) if n.startswith("teacher_")))
    key = cells.key({name: getattr(args, name) for name in names} | {"texts": texts})
    folder = args.teachers / key
    if folder.is_dir():
        print(f"teacher: {folder}, trained earlier with these settings")
        return models.load(str(folder))
    torch.manual_seed(0)
    tokenizer = text.train_tokenizer(texts, args.vocabulary)
    shape = (args.teacher_layers, args.teacher_width, args.teacher_heads)
    teacher = models.gpt2(*shape, dropout=0.0, tokenizer=tokenizer, length=args.max_length)
    blocks = text.pack(text.tokenize(tokenizer, texts), args.max_length).to(args.device)
    steps = args.teacher_epochs * -(-len(blocks) // args.batch_size)
    alone = kdloss.Distiller(teacher.to(args.device), kdloss.VanillaKD(alpha=1.0))
    checkpoint = Checkpoint(args.teachers / f"{key}.checkpoint", every=args.save_every)
    train(
        alone,
        teacher,
        AdamW(teacher.parameters(), lr=args.teacher_lr),
        text.batches(blocks, args.batch_size, steps, seed=0),
        steps,
        lambda model: float("nan"),
        checkpoint,
        title="teacher",
    )
    models.save(teacher, tokenizer, folder)
    checkpoint.remove()
    print(f"teacher: kept in {folder}")
    return models.load(str(folder))


def student_of(args: argparse.Namespace, setup: Setup) -> PreTrainedModel:
    """A student before training: the same one for the same seed."""
    torch.manual_seed(args.seed)
    if args.student is not None:
        student, tokenizer = models.load(args.student)
        models.check_vocabulary(student, setup.teacher, tokenizer, setup.tokenizer)
    elif args.keep_blocks is not None:
        student = kdloss.keep_blocks(setup.teacher, args.keep_blocks)
    else:
        shape = (args.student_layers, args.student_width, args.student_heads)
        student = models.gpt2(
            *shape, dropout=args.dropout, tokenizer=setup.tokenizer, length=args.max_length
        )
    models.check_length(student, args.max_length, "student")
    student.get_input_embeddings().requires_grad_(not args.freeze_embeddings)
    return student.to(args.device)


def run(
    args: argparse.Namespace, setup: Setup, checkpoints: Path, students: Path | None = None
) -> dict[str, Any]:
    """Train one student, keep it if there is a folder for it, and say what came of it."""
    student, criterion = student_of(args, setup), criterion_for(args)
    distill = kdloss.Distiller(setup.teacher, criterion).prepare(student)
    optimizer = AdamW([*student.parameters(), *criterion.parameters()], lr=args.lr)
    blocks = text.draw(setup.blocks, args.student_blocks, args.seed)
    steps = args.steps or args.epochs * -(-len(blocks) // args.batch_size)
    checkpoint = Checkpoint(checkpoints, every=args.save_every)
    curve = train(
        distill,
        student,
        optimizer,
        text.batches(blocks, args.batch_size, steps, args.seed),
        steps,
        partial(evaluation.perplexity, blocks=setup.heldout),
        checkpoint,
        points=args.points,
        title=f"{args.method} ({args.seed})",
    )
    if students is not None:
        models.save(student, setup.tokenizer, students)
    last = curve[-1]
    batch = next(text.batches(blocks, args.batch_size, 1, args.seed))
    in_use = [student, criterion, setup.teacher] if criterion.alpha < 1 else [student, criterion]
    held = memory.held(optimizer, *in_use)
    peak = memory.training_memory(lambda: distill(student, **batch).loss.backward(), held)
    return {
        "perplexity": last["perplexity"],
        **evaluation.evaluate(student, setup.tokenizer, setup.prompts, setup.reference),
        "seed": args.seed,
        "steps": steps,
        "seconds": last["seconds"],
        "trained_tokens_per_second": last["tokens"] / last["seconds"],
        "lowest_perplexity": min(point["perplexity"] for point in curve),
        "training_megabytes": peak / 2**20,
        "curve": curve,
    }


def settings_of(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What a student's results depend on: settings that its method doesn't use are left out."""
    unused = {"output", "teachers", "save_every", "device", *UNUSED[args.method]}
    return {name: value for name, value in vars(args).items() if name not in unused} | {"text": setup.key}


def measured(args: argparse.Namespace, setup: Setup, students: Path | None = None) -> dict[str, Any]:
    """The results of `run`, or those it had when it ran with these settings earlier."""
    settings = settings_of(args, setup)
    kept = students / f"{args.method}-{cells.key(settings)}" if students is not None else None
    return cells.cell(
        args.output / "cells", args.method, settings, lambda folder: run(args, setup, folder, kept)
    )


def teacher_measured(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What the teacher itself is worth on the same held-out text."""

    def work(_: Path) -> dict[str, Any]:
        found = evaluation.evaluate(setup.teacher, setup.tokenizer, setup.prompts, setup.reference)
        return found | {"perplexity": evaluation.perplexity(setup.teacher, setup.heldout)}

    settings = {"text": setup.key, "continuations": args.continuations}
    return cells.cell(args.output / "cells", "teacher", settings, work)


def parser(description: str | None = __doc__, **settings: Any) -> argparse.ArgumentParser:
    """Every setting is a flag."""
    made = options.parser(description, **settings)
    options.text_flags(made)
    options.teacher_flags(made)
    options.student_flags(made)
    options.training_flags(made)
    options.distillation_flags(made)
    options.evaluation_flags(made, "runs/distill_lm")
    return made


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train the student alone and with the teacher, and write what came of both."""
    args = parser().parse_args(arguments)
    setup = prepare(args)
    teacher = teacher_measured(args, setup)
    alone = measured(
        argparse.Namespace(**(vars(args) | {"method": "none"})), setup, args.output / "students"
    )
    runs = {"teacher": [report.beside(teacher, teacher)], "none": [report.beside(alone, teacher)]}
    if args.method != "none":
        found = measured(args, setup, args.output / "students")
        runs[args.method] = [report.beside(found, teacher, alone)]
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
