"""A chain of students, each the teacher of the next, beside the last one distilled directly.

As it stands, a teacher of 4 blocks teaches 3 x 112, which teaches 2 x 96, which teaches 1 x 64:

    python applications/chain.py --stages 3x112 2x96 1x64
    python applications/chain.py --teacher gpt2-xl --stages gpt2-large gpt2-medium gpt2 --data my.jsonl

The last student is also trained by the first teacher directly, for the steps of its own stage and
for the CPU time of the whole chain, and alone. Killed at any instant, the same command goes on with
the stage it was in.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_lm
from parts import cells, models, report, setup


def parser() -> argparse.ArgumentParser:
    """The flags of distill_lm.py, and the stages."""
    made = distill_lm.parser(__doc__)
    made.set_defaults(output=Path("runs/chain"), samples=6000)
    made.add_argument_group("chain").add_argument(
        "--stages",
        nargs="+",
        default=["3x112", "2x96", "1x64"],
        help="students from first to last: blocks x width of new ones, folders or hub names (%(default)s)",
    )
    return made


def stage(args: argparse.Namespace, student: str, **more: Any) -> argparse.Namespace:
    """The settings of one stage."""
    layers, cross, width = student.partition("x")
    if cross and layers.isdecimal() and width.isdecimal():
        heads = max(n for n in range(1, 5) if int(width) % n == 0)
        more |= {"student_layers": int(layers), "student_width": int(width), "student_heads": heads}
    else:
        more |= {"student": student}
    settings = {name: value for name, value in vars(args).items() if name != "stages"}
    return argparse.Namespace(**(settings | more))


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train one student after the other, then the last one without those between."""
    args = parser().parse_args(arguments)
    first = setup.prepare(args, distill_lm.train)
    students = args.output / "students"
    best = distill_lm.teacher_measured(args, first)
    runs = {"teacher": [report.beside(best, best)]}
    taught, path, seconds = first, [], 0.0
    for name in args.stages:
        path.append(Path(name).name)
        found = distill_lm.measured(stage(args, name), taught, name="-".join(path), students=students)
        runs[" > ".join(path)] = [report.beside(found, best)]
        seconds += found["seconds"]
        model = models.load(found["student"])[0].to(args.device).eval()
        taught = replace(first, teacher=model, key=cells.key({"text": first.key, "teacher": found["student"]}))

    last = stage(args, args.stages[-1])
    direct = distill_lm.measured(last, first, name="direct", students=students)
    longer = argparse.Namespace(**vars(last))
    longer.steps = round(direct["steps"] * seconds / direct["seconds"])
    last.method = "none"
    others = {
        "direct": direct,
        "direct, the chain's time": distill_lm.measured(longer, first, name="direct-longer", students=students),
        "none": distill_lm.measured(last, first, students=students),
    }
    runs |= {row: [report.beside(found, best, others["none"])] for row, found in others.items()}
    print(report.write(runs, vars(args), args.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
