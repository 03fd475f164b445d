"""Run a teacher once, keep its most probable classes on disk, and train a student from them.

By default, a small GPT-2 runs once over the student's text and is then removed from memory:

    python applications/offline_teacher.py --ks 16 64 256 --seeds 0 1 2
    python applications/offline_teacher.py --teacher my/teacher --data texts.jsonl

The baselines are the same student without a teacher, and with the teacher in memory at every step. All other flags are
those of distill_lm.py. If the run is killed, the same command resumes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import datasets
import distill_lm
import torch
from parts import cells, evaluation, memory, models, operations, options, report, text
from parts.setup import Setup, prepare, student_of
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel
from typing_extensions import Doc

import kdloss
import kdloss.cache


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and how many classes to keep."""

    ks: Annotated[list[int], Doc("classes to keep at every position; a cache and a row for each k")]
    seeds: Annotated[list[int], Doc("seeds to repeat everything with")]


DEFAULTS = Settings(output=Path("runs/offline_teacher"), samples=6000, ks=[256], seeds=[0])
NOTES = f"""\
{distill_lm.NOTES}
Live: the teacher runs at every step. k: its predictions are read from disk, k classes at every position and the total
probability of all other classes."""


class FromCache:
    """Replaces the `kdloss.Distiller` in the loop of distill_lm.py; it has no teacher."""

    def __init__(self, cache: kdloss.cache.Cache, criterion: kdloss.VanillaKD) -> None:
        self.cache, self.criterion = cache, criterion
        self.distill = kdloss.Distiller(None, criterion)

    def __call__(self, student: PreTrainedModel, ids: list[int], input_ids: Tensor, labels: Tensor) -> kdloss.Distilled:
        """Run the student, and compute the loss against the cached predictions."""
        return self.distill(student, input_ids=input_ids, labels=labels, teacher=self.cache[ids])


def write(k: int, args: distill_lm.Settings, setup: Setup) -> Path:
    """Run the teacher on every block of the student's text; the id of a block is its number."""
    data = {"id": range(len(setup.blocks)), "input_ids": setup.blocks.tolist()}
    settings = {"k": k, "temperature": args.temperature}
    folder = args.output / "cache" / cells.key(settings | {"text": setup.key})
    rows = datasets.Dataset.from_dict(data)
    kdloss.cache.write(folder, setup.teacher, rows, tokenizer=setup.tokenizer, **settings)
    return folder


def batches(setup: Setup, args: distill_lm.Settings, steps: int) -> Iterator[dict[str, Any]]:
    """The batches of distill_lm.py, with the ids of their blocks."""
    drawn = text.draw(torch.arange(len(setup.blocks)), args.student_blocks, args.seed)
    for batch in text.batches(drawn, args.batch_size, steps, args.seed):
        ids = batch["input_ids"]
        yield {"ids": ids.tolist(), "input_ids": setup.blocks[ids], "labels": setup.blocks[ids]}


def fit(k: int, args: distill_lm.Settings, setup: Setup, folder: Path) -> dict[str, Any]:
    """Train a student from a cache. The teacher leaves memory before the first step and is loaded again at the end."""
    kept = write(k, args, setup)
    cache = kdloss.cache.open(kept, tokenizer=setup.tokenizer, device=args.device)
    student = student_of(args, setup.teacher, setup.tokenizer)
    distill = FromCache(cache, distill_lm.criterion_for(args, causal=True))
    first = next(batches(setup, args, 1))
    losses = compared(distill, student, setup.teacher, first)
    source = args.teacher or setup.teacher.name_or_path
    setup.teacher = setup.judge = None
    optimizer = AdamW(student.parameters(), lr=args.lr)
    steps = args.steps or args.epochs * -(-(args.student_blocks or len(setup.blocks)) // args.batch_size)
    curve = distill_lm.train(
        distill,
        student,
        optimizer,
        batches(setup, args, steps),
        steps,
        partial(evaluation.perplexity, blocks=setup.heldout),
        folder,
        save_every=args.save_every,
        points=args.points,
        title="from the cache",
    )
    models.save(student, setup.tokenizer, args.output / "students" / f"k-{k}-{args.seed}")
    held = memory.held(optimizer, student)
    peak = memory.training_memory(lambda: distill(student, **first).loss.backward(), held)
    teraflop = operations.of_training(
        lambda batch: distill(student, **batch).loss.backward(), batches(setup, args, steps)
    )
    setup.teacher = setup.judge = models.load(source)[0].to(args.device).eval()
    size = sum(file.stat().st_size for file in kept.iterdir()) / 2**20
    found = distill_lm.outcome(student, args, setup, curve, steps, peak, teraflop)
    return {**found, **losses, "cache_megabytes": size}


@torch.no_grad()
def compared(
    distill: FromCache, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Any]
) -> dict[str, float]:
    """The divergence on one batch, once from the cache and once from the teacher."""
    live = kdloss.Distiller(teacher, distill.criterion)
    tokens = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    return {
        "kd_from_cache": distill(student, **batch).components["kd"].item(),
        "kd_live": live(student, **tokens).components["kd"].item(),
    }


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train alone, with the teacher, and from the caches, and write the results."""
    args = options.read(DEFAULTS, arguments, __doc__)
    if args.method != "vanilla":
        raise ValueError(f"a cache holds predictions and no features: --method {args.method} needs the teacher")
    setup = prepare(args, distill_lm.train)
    best = distill_lm.teacher_measured(args, setup)
    rows = ["none", "live", *(f"k {k}" for k in args.ks)]
    runs: dict[str, list[dict[str, Any]]] = {"teacher": [report.beside(best, best)], **{row: [] for row in rows}}
    for seed in args.seeds:
        shared = options.some(distill_lm.Settings, args, seed=seed)
        alone = distill_lm.measured(replace(shared, method="none"), setup, students=args.output / "students")
        live = distill_lm.measured(shared, setup, students=args.output / "students")
        settings = distill_lm.settings_of(shared, setup)
        cached = [
            cells.cell(args.output / "cells", f"k-{k}", settings | {"k": k}, partial(fit, k, shared, setup))
            for k in args.ks
        ]
        for row, found in zip(rows, [alone, live, *cached], strict=True):
            runs[row].append(report.beside(found, best, None if row == "none" else alone))
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
