"""What distributed.py and with_accelerate.py share: flags, data, results."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Doc

import kdloss
from parts import cells, files, models, options, report, setup, text

Curve = list[tuple[int, float]]


@dataclass(kw_only=True)
class Settings:
    """The flags of both scripts."""

    teacher: Annotated[str | None, Doc("folder or hub name; else a small one is trained first")] = None
    student: Annotated[str | None, Doc("folder or hub name; else a new GPT-2 of 2 blocks")] = None
    data: Annotated[str | None, Doc(".jsonl, .json, .csv, .txt or a dataset's name; else packaged text")] = None
    samples: Annotated[int, options.COUNT, Doc("use so many texts")] = 2000
    max_length: Annotated[int, options.COUNT, Doc("tokens in a block")] = 64
    steps: Annotated[int, options.COUNT, Doc("optimizer steps of a student")] = 200
    every: Annotated[int, options.COUNT, Doc("evaluate and save after so many")] = 50
    batch_size: Annotated[int, options.COUNT, Doc("blocks in a step, all ranks")] = 8
    lr: Annotated[float, Doc("learning rate")] = 2e-3
    temperature: Annotated[float, Doc("of both models' predictions")] = 1.0
    alpha: Annotated[float, Doc("share of cross-entropy")] = 0.3
    layers: Annotated[str | list[int] | list[str], options.BLOCKS, Doc("student layers")] = "last"
    seed: Annotated[int, Doc("of the student and the order of batches")] = 0
    output: Annotated[Path, Doc("folder, seen by all machines")]


def criteria(args: Settings) -> dict[str, kdloss.VanillaKD | kdloss.FeatureKD]:
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
    args: Settings, parts: int, first: bool, wait: Callable[[], None], train: setup.Train
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


@dataclass(kw_only=True)
class Small(options.Training, options.Teacher, options.Text):
    """What a teacher that is trained first has."""


def teacher_of(args: Settings, texts: list[str], train: setup.Train) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher asked for; for want of one a small one of these texts."""
    given = {"teacher": args.teacher, "teachers": args.output / "teachers", "max_length": args.max_length}
    return setup.teacher_of(Small(**given, teacher_lr=2e-3, device="cpu"), texts, train)


def student_of(args: Settings, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A student before training; the seed makes it, and projections after it, the same in every process."""
    torch.manual_seed(args.seed)
    if args.student is None:
        return models.gpt2(2, 64, 4, dropout=0.0, tokenizer=tokenizer, length=args.max_length)
    student, its_own = models.load(args.student)
    models.check_vocabulary(student, teacher, its_own, tokenizer)
    return student


def check(student: PreTrainedModel, teacher: PreTrainedModel, args: Settings) -> None:
    """Say what does not fit before hours are spent on it."""
    models.check_length(student, args.max_length, "student")
    models.check_length(teacher, args.max_length, "teacher")
    if student.config.vocab_size != teacher.config.vocab_size:  # a teacher may have more than its tokenizer
        raise ValueError(
            f"the student has a vocabulary of {student.config.vocab_size} tokens, the teacher one of "
            f"{teacher.config.vocab_size}: give a --student of the teacher's family"
        )


def settings_of(args: Settings) -> dict[str, Any]:
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


def write(curves: Mapping[str, Curve], args: Settings) -> dict[str, float]:
    """Held-out perplexities: the last ones returned, all of them as JSON, and a table and a picture."""
    results = {name: curve[-1][1] for name, curve in curves.items()}
    content = {"perplexity": results, "curves": curves, "settings": settings_of(args)}
    files.save_json(content, args.output / "results.json")
    print(report.curves(results, curves, args.output))
    return results
