"""Measure which blocks of teacher and student are similar, before you choose layers.

By default, it compares the teacher of distill_lm.py with its student after training without a teacher, because the
blocks of an untrained student say little. With --student or --keep-blocks it takes the student as it is:

    python applications/choose_layers.py --teacher gpt2-medium --student gpt2 --data my.jsonl

It prints the CKA of every pair of blocks and the pairing that this suggests, and draws a heat map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import distill_lm
from matplotlib.figure import Figure
from parts import files, models, options, setup
from tqdm import tqdm
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and how much text to compare on."""

    batches: Annotated[int, options.COUNT, Doc("batches of text to compare on")] = 16


DEFAULTS = Settings(output=Path("runs/choose_layers"), samples=6000, method="none")


def main(arguments: Sequence[str] | None = None) -> kdloss.analysis.CKAMatrix:
    """Measure the similarities, print them and draw them."""
    args = options.read(DEFAULTS, arguments, __doc__)
    made = setup.prepare(args, distill_lm.train)
    if args.student or args.keep_blocks:
        student = setup.student_of(args, made.teacher, made.tokenizer)
    else:
        settings = options.some(distill_lm.Settings, args)
        found = distill_lm.measured(settings, made, students=args.output / "students")
        student = models.load(found["student"])[0].to(args.device)

    batches = made.blocks.split(args.batch_size)[: args.batches]
    bar = tqdm([{"input_ids": blocks} for blocks in batches], "CKA", unit="batch", dynamic_ncols=True)
    similar = kdloss.analysis.cka_matrix(student, made.teacher, bar)
    pairs = similar.pairing(args.layers or "auto")

    print("CKA of student blocks (rows) and teacher blocks (columns)")
    for s, values in enumerate(similar.values.tolist()):
        print(f"{s:3}", *(f"{value:5.2f}" for value in values))
    print(f"suggested: FeatureKD(pairing={[(s, t) for s, t, _ in pairs]})")
    files.save_json({"values": similar.values.tolist(), "pairing": pairs}, args.output / "results.json")
    figure = Figure(layout="constrained")
    similar.heatmap(figure.subplots())
    with files.replacing(args.output / "results.png") as partial:
        figure.savefig(partial, format="png", dpi=150)
    return similar


if __name__ == "__main__":
    main()
