"""What distributed.py and with_accelerate.py share: flags, data, results."""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdloss
from parts import cells, files, models, options, report, setup, text

Curve = list[tuple[int, float]]


def parser(description: str, output: str) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    made = options.parser(description)
    add = made.add_argument
    add("--teacher", help="folder or hub name (default: train a small one first)")
    add("--student", help="folder or hub name (default: a new GPT-2 of 2 blocks)")
    add("--data", help=".jsonl, .json, .csv, .txt or a dataset's name (default: packaged text)")
    add("--samples", type=options.positive, default=2000, help="use so many texts (%(default)s)")
    add("--max-length", type=options.positive, default=64, help="tokens in a block (%(default)s)")
    add("--steps", type=options.positive, default=200, help="optimizer steps of a student (%(default)s)")
    add("--every", type=options.positive, default=50, help="evaluate and save after so many (%(default)s)")
    add("--batch-size", type=options.positive, default=8, help="blocks in a step, all ranks (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--temperature", type=float, default=1.0, help="of both models' predictions (%(default)s)")
    add("--alpha", type=float, default=0.3, help="share of cross-entropy (%(default)s)")
    add("--layers", type=options.blocks_or_names, default="last", help="student layers (%(default)s)")
    add("--seed", type=int, default=0, help="of the student and the order of batches (%(default)s)")
    add("--output", type=Path, default=Path(output), help="folder, seen by all machines (%(default)s)")
    return made


def criteria(args: argparse.Namespace) -> dict[str, kdloss.VanillaKD | kdloss.FeatureKD]:
    """Training alone, in which the teacher does not even run, and distillation."""
    distilled = kdloss.FeatureKD(
        args.layers,
        distance=kdloss.distances.layer_norm_mse,
        alpha=args.alpha,
        temperature=args.temperature,
        logit_weight=1.0,
    )
    return {"alone": kdloss.VanillaKD(alpha=1.0), "distilled": distilled}


def prepare(
    args: argparse.Namespace, parts: int, first: bool, wait: Callable[[], None], train: setup.Train
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor, Tensor]:
    """Teacher, tokenizer, and blocks of tokens to train and to evaluate on: the same in every process.

    A batch is cut into so many parts. Only the first process writes, the others `wait` for it.
    """
    if args.batch_size % parts:
        raise ValueError(
            f"a batch of {args.batch_size} does not divide into {parts} equal parts (processes times "
            f"micro-batches): --batch-size {parts * -(-args.batch_size // parts)}"
        )
    prepared = cells.begun(args.output, settings_of(args))
    texts = text.read_texts(args.data, limit=args.samples)
    unseen, seen = texts[: -(-len(texts) // 10)], texts[-(-len(texts) // 10) :]
    if not first:
        wait()
    teacher, tokenizer = teacher_of(args, seen, train)
    if first:
        wait()
    check(student_of(args, teacher, tokenizer), teacher, args)
    blocks, heldout = (text.pack(text.tokenize(tokenizer, t), args.max_length) for t in (seen, unseen))
    if min(len(blocks), len(heldout)) < args.batch_size:
        raise ValueError(
            f"{len(blocks)} blocks of text to train and {len(heldout)} to evaluate on do not fill a batch "
            f"of {args.batch_size}: more text (--samples), or a smaller --batch-size or --max-length"
        )
    if first and not prepared:
        files.save_json(settings_of(args), args.output / "settings.json")
    whole = len(heldout) // args.batch_size * args.batch_size  # every rank gets equally many
    return teacher.requires_grad_(False), tokenizer, blocks, heldout[:whole]


def teacher_of(
    args: argparse.Namespace, texts: list[str], train: setup.Train
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher asked for; for want of one a small one of these texts."""
    small = {"layers": 4, "width": 128, "heads": 4, "lr": 2e-3, "epochs": 1, "samples": None}
    return setup.teacher_of(
        argparse.Namespace(
            teacher=args.teacher,
            teachers=args.output / "teachers",
            vocabulary=2048,
            max_length=args.max_length,
            batch_size=8,
            save_every=60.0,
            device="cpu",
            **{f"teacher_{name}": value for name, value in small.items()},
        ),
        texts,
        train,
    )


def student_of(
    args: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A student before training; the seed makes it, and projections after it, the same in every process."""
    torch.manual_seed(args.seed)
    if args.student is None:
        return models.gpt2(2, 64, 4, dropout=0.0, tokenizer=tokenizer, length=args.max_length)
    student, its_own = models.load(args.student)
    models.check_vocabulary(student, teacher, its_own, tokenizer)
    return student


def check(student: PreTrainedModel, teacher: PreTrainedModel, args: argparse.Namespace) -> None:
    """Say what does not fit before hours are spent on it."""
    models.check_length(student, args.max_length, "student")
    models.check_length(teacher, args.max_length, "teacher")
    if student.config.vocab_size != teacher.config.vocab_size:  # a teacher may have more than its tokenizer
        raise ValueError(
            f"the student has a vocabulary of {student.config.vocab_size} tokens, the teacher one of "
            f"{teacher.config.vocab_size}: give a --student of the teacher's family"
        )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two runs the same."""
    return {name: str(value) for name, value in vars(args).items() if name != "output"}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say what failed and leave no half of it; what was complete before stays."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written, {free:.1f} MB are free there. Make room and give the same "
            "command again: it goes on from the last complete checkpoint"
        ) from error


def save(
    student: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write the student of a `kdloss.Distillation` with its gathered weights, and the tokenizer."""
    own = {name.removeprefix("student."): w for name, w in weights.items() if name.startswith("student.")}
    with files.replacing(folder) as partial, writing(partial):
        student.save_pretrained(partial, state_dict=own)
        tokenizer.save_pretrained(partial)


def write(curves: Mapping[str, Curve], args: argparse.Namespace) -> dict[str, float]:
    """Held-out perplexities: the last ones returned, all of them as JSON, and a table and a picture."""
    results = {name: curve[-1][1] for name, curve in curves.items()}
    content = {"perplexity": results, "curves": curves, "settings": settings_of(args)}
    files.save_json(content, args.output / "results.json")
    print(report.curves(results, curves, args.output))
    return results
