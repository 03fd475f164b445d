"""Helpers to train one student in several processes: equal data for all of them, files written by one."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parts import files, report, setup, text

Curve = list[tuple[int, float]]


def prepare(args: Any, shares: int, first: bool, wait: Callable[[], None], train: setup.Train) -> setup.Setup:
    """Teacher, tokenizer, and blocks of tokens to train and to evaluate on; the same in every process.

    A batch is split into this many shares. Only the first process writes files; the others `wait` for it.
    """
    size = args.batch_size
    if size % shares:
        raise ValueError(
            f"a batch of {size} does not divide into {shares} equal parts (processes times micro-batches): "
            f"--batch-size {shares * -(-size // shares)}"
        )
    if not first:
        wait()
    made = setup.prepare(args, train)
    if first:
        wait()
    setup.student_of(args, made.teacher, made.tokenizer)  # raises an error early if the student does not fit
    blocks = text.draw(made.blocks, args.student_blocks, args.seed)
    heldout = made.heldout[: len(made.heldout) // size * size]  # the same number for every process
    if len(blocks) < size or not len(heldout):
        raise ValueError(
            f"{len(blocks)} blocks of text to train and {len(made.heldout)} to evaluate on do not fill a batch of "
            f"{size}: use more text (--samples, --heldout-samples), or a smaller --batch-size or --max-length"
        )
    made.teacher.requires_grad_(False)
    return replace(made, blocks=blocks, heldout=heldout)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """On an error, remove the incomplete folder and raise an error with the free space; earlier files stay."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        free = shutil.disk_usage(folder.parent).free / 2**20
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written, {free:.1f} MB are free there. Free some space and run the same "
            "command again: it resumes from the last complete checkpoint"
        ) from error


def save(
    student: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Save the student of a `kdloss.Distillation` with the gathered weights, and the tokenizer."""
    own = {name.removeprefix("student."): w for name, w in weights.items() if name.startswith("student.")}
    with files.replacing(folder) as partial, writing(partial):
        student.save_pretrained(partial, state_dict=own)
        tokenizer.save_pretrained(partial)


def write(curves: Mapping[str, Curve], settings: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Write held-out perplexities as JSON, a table and a picture; return the last ones."""
    results = {name: curve[-1][1] for name, curve in curves.items()}
    content = {"perplexity": results, "curves": curves, "settings": settings}
    files.save_json(content, folder / "results.json")
    print(report.curves(results, curves, folder))
    return results
