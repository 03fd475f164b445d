"""What several processes need that train one student: data cut alike for all of them, and files from one."""

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


def prepare(args: Any, parts: int, first: bool, wait: Callable[[], None], train: setup.Train) -> setup.Setup:
    """Teacher, tokenizer, and blocks of tokens to train and to evaluate on: the same in every process.

    A batch is cut into so many parts. Only the first process writes, the others `wait` for it.
    """
    size = args.batch_size
    if size % parts:
        raise ValueError(
            f"a batch of {size} does not divide into {parts} equal parts (processes times micro-batches): "
            f"--batch-size {parts * -(-size // parts)}"
        )
    if not first:
        wait()
    made = setup.prepare(args, train)
    if first:
        wait()
    setup.student_of(args, made.teacher, made.tokenizer)  # what does not fit is said before hours are spent on it
    blocks = text.draw(made.blocks, args.student_blocks, args.seed)
    heldout = made.heldout[: len(made.heldout) // size * size]  # every process gets equally many
    if len(blocks) < size or not len(heldout):
        raise ValueError(
            f"{len(blocks)} blocks of text to train and {len(made.heldout)} to evaluate on do not fill a batch of "
            f"{size}: more text (--samples, --heldout-samples), or a smaller --batch-size or --max-length"
        )
    made.teacher.requires_grad_(False)
    return replace(made, blocks=blocks, heldout=heldout)


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


def write(curves: Mapping[str, Curve], settings: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Held-out perplexities: the last ones returned, all of them as JSON, and a table and a picture."""
    results = {name: curve[-1][1] for name, curve in curves.items()}
    content = {"perplexity": results, "curves": curves, "settings": settings}
    files.save_json(content, folder / "results.json")
    print(report.curves(results, curves, folder))
    return results
