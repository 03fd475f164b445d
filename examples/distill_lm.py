"""Distil a language model four ways, beside training alone at equal steps and at equal CPU time.

As it stands, it trains a small GPT-2 on Wikipedia summaries, and a smaller one that sees a small
part of them again and again. By flags, teacher, student, text and everything else are yours:

    python examples/distill_lm.py --teacher my/teacher --keep-blocks auto --data texts.jsonl
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from parts import evaluation, memory, models, options, report, text
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

import kdloss

ALONE, SAME_TIME = "alone", "alone-same-time"
DISTILLED = ("vanilla", "feature", "feature+output")
METHODS = [ALONE, *DISTILLED, SAME_TIME]
NOTES = """\
Perplexity and ROUGE-L (greedy continuations against the real ones) on texts no model has seen.
Retention: the teacher's perplexity over the student's. CPU seconds and tokens/s count the time of
all cores together, evaluation left out. Train MB: tensors alive at the peak of one training step
(weights of student and teacher, gradients, optimizer state, activations)."""


def criterion_for(method: str, args: argparse.Namespace) -> kdloss.VanillaKD | kdloss.FeatureKD:
    """The loss of a method; with alpha=1 no teacher is run at all."""
    if method in (ALONE, SAME_TIME):
        return kdloss.VanillaKD(alpha=1.0)
    if method == "vanilla":
        return kdloss.VanillaKD(args.temperature, args.alpha)
    explicit = isinstance(args.pairing, list)  # pairs of layers leave no layers to choose
    return kdloss.FeatureKD(
        args.layers or ("auto" if explicit else "last"),
        pairing=args.pairing,
        distance=getattr(kdloss, args.distance),
        alpha=args.feature_alpha,
        temperature=args.temperature,
        logit_weight=args.logit_weight if method == "feature+output" else 0.0,
    )


def train(
    distill: kdloss.Distiller,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    perplexity: Callable[[PreTrainedModel], float],
    *,
    points: int = 6,
    title: str = "student",
) -> list[dict[str, float]]:
    """Train the student; returns its learning curve, the seconds without those of evaluation."""
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device, seconds, tokens = student.device, 0.0, 0
    curve = [{"step": 0, "tokens": 0, "seconds": 0.0, "perplexity": perplexity(student)}]
    student.train()
    bar = tqdm(batches, title, steps, unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar, start=1):
        start = evaluation.clock(device)
        out = distill(student, **batch)  # without a teacher: student(**batch)
        out.loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += evaluation.clock(device) - start
        tokens += batch["input_ids"].numel()
        if step * points // steps > (step - 1) * points // steps:
            point = {"step": step, "tokens": tokens, "seconds": seconds, "perplexity": perplexity(student)}
            curve.append(point)
            bar.set_postfix(loss=f"{out.loss.item():.3f}", held_out=f"{point['perplexity']:.1f}")
    return curve


def teacher_of(
    args: argparse.Namespace, texts: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher asked for; else one trained on all these texts, kept for the next time."""
    if args.teacher is not None:
        return models.load(args.teacher)
    names = ("vocabulary", "max_length", "batch_size", *(n for n in vars(args) if n.startswith("teacher_")))
    settings = {name: getattr(args, name) for name in names} | {"texts": texts}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = args.teachers / key
    if folder.is_dir():
        print(f"teacher: {folder}, trained earlier with these settings")
        return models.load(str(folder))
    torch.manual_seed(0)
    tokenizer = text.train_tokenizer(texts, args.vocabulary)
    shape = (args.teacher_layers, args.teacher_width, args.teacher_heads)
    teacher = models.gpt2(*shape, dropout=0.0, tokenizer=tokenizer, length=args.max_length)
    blocks = text.pack(text.tokenize(tokenizer, texts), args.max_length)
    teacher.to(args.device)
    models.train_alone(
        teacher, blocks, epochs=args.teacher_epochs, batch_size=args.batch_size, lr=args.teacher_lr
    )
    models.save(teacher, tokenizer, folder)
    print(f"teacher: kept in {folder}")
    return teacher, tokenizer


def student_of(
    args: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A student before training: the same one for the same seed."""
    torch.manual_seed(seed)
    if args.student is not None:
        student, _ = models.load(args.student)
    elif args.keep_blocks is not None:
        student = kdloss.keep_blocks(teacher, args.keep_blocks)
    else:
        shape = (args.student_layers, args.student_width, args.student_heads)
        student = models.gpt2(*shape, dropout=args.dropout, tokenizer=tokenizer, length=args.max_length)
    student.get_input_embeddings().requires_grad_(not args.freeze_embeddings)
    return student.to(args.device)


def run(
    method: str,
    seed: int,
    steps: int,
    args: argparse.Namespace,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor,
    heldout: dict[str, Tensor],
) -> dict[str, Any]:
    """Train one student by one method, and say what came of it."""
    student = student_of(args, teacher, tokenizer, seed)
    criterion = criterion_for(method, args)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    optimizer = AdamW([*student.parameters(), *criterion.parameters()], lr=args.lr)
    batches = text.batches(blocks, args.batch_size, steps, seed)
    perplexity = partial(evaluation.perplexity, blocks=heldout["blocks"])
    curve = train(
        distill,
        student,
        optimizer,
        batches,
        steps,
        perplexity,
        points=args.points,
        title=f"{method} ({seed})",
    )
    if method in DISTILLED:
        models.save(student, tokenizer, args.output / "students" / f"{method}-seed{seed}")
    last = curve[-1]
    found = evaluation.evaluate(student, tokenizer, **heldout)
    batch = next(text.batches(blocks, args.batch_size, 1, seed))
    in_use = [student, criterion, teacher] if criterion.alpha < 1 else [student, criterion]
    held = memory.held(optimizer, *in_use)
    peak = memory.training_memory(lambda: distill(student, **batch).loss.backward(), held)
    return found | {
        "seed": seed,
        "steps": steps,
        "seconds": last["seconds"],
        "trained_tokens_per_second": last["tokens"] / last["seconds"],
        "lowest_perplexity": min(point["perplexity"] for point in curve),
        "training_megabytes": peak / 2**20,
        "curve": curve,
    }


def distil(
    args: argparse.Namespace,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor,
    heldout: dict[str, Tensor],
) -> dict[str, list[dict[str, Any]]]:
    """All methods for all seeds, and the teacher to compare with: results by method, one per seed."""
    steps = args.steps or args.epochs * -(-len(blocks) // args.batch_size)
    print(
        f"students: {blocks.numel()} tokens of text, {steps} steps of {args.batch_size} x {args.max_length}"
    )
    runs = {"teacher": [evaluation.evaluate(teacher, tokenizer, **heldout)]}
    runs |= {method: [] for method in METHODS if method in args.methods}
    for seed in args.seeds:
        for method in list(runs)[1:]:
            budget = steps
            if method == SAME_TIME:  # the steps that take as long as the slowest distilled student took
                slowest = max(runs[m][-1]["seconds"] for m in runs if m in DISTILLED)
                budget = round(steps * slowest / runs[ALONE][-1]["seconds"])
            runs[method].append(run(method, seed, budget, args, teacher, tokenizer, blocks, heldout))
    best = runs["teacher"][0]
    for found in (found for seeds in runs.values() for found in seeds):
        found["retention"] = 100 * best["perplexity"] / found["perplexity"]
        found["compression"] = best["parameters"] / found["parameters"]
    return runs


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Read text, get a teacher, distil students, and write what came of it."""
    args = options.parser(__doc__ or "", METHODS).parse_args(arguments)
    if SAME_TIME in args.methods and not (ALONE in args.methods and {*DISTILLED} & {*args.methods}):
        raise ValueError(f"{SAME_TIME!r} needs {ALONE!r} and one of {DISTILLED} for its time")
    args.output.mkdir(parents=True, exist_ok=True)
    source = {"config": args.data_config, "split": args.split, "column": args.text_column}
    texts = text.read_texts(args.data, **source, limit=args.samples)
    heldout, seen = texts[: args.heldout_samples], texts[args.heldout_samples :]
    if not seen:
        raise ValueError(
            f"all {len(texts)} texts are held out, none is left to train on: --heldout-samples"
        )
    teacher, tokenizer = teacher_of(args, seen)
    teacher.to(args.device)

    student_samples = args.student_samples or (len(seen) if args.teacher else 320)
    blocks = text.pack(text.tokenize(tokenizer, seen[:student_samples]), args.max_length)
    token_ids = text.tokenize(tokenizer, heldout)
    prompts, reference = evaluation.continuations(token_ids, args.continuations, args.max_length)
    unseen = {"blocks": text.pack(token_ids, args.max_length), "prompts": prompts, "reference": reference}
    runs = distil(args, teacher, tokenizer, blocks.to(args.device), unseen)

    report.save_json(runs, vars(args), args.output / "results.json")
    report.save_picture(runs, args.output / "curves.png")
    claims = report.comparison(runs, DISTILLED, (ALONE, SAME_TIME))
    shown = "\n".join([report.table(runs), "", NOTES, "", *claims])
    (args.output / "results.md").write_text(shown + "\n", encoding="utf-8")
    print(f"\n{shown}\n\nwritten: {args.output}/results.json, results.md, curves.png, students/")
    return runs


if __name__ == "__main__":
    main()
