"""Distil through a chain of students, each the teacher of the next, and compare with direct distillation.

By default, a teacher of 4 blocks teaches a student of 3 x 112 (blocks x width), which teaches 2 x 96, then 1 x 64:

    python applications/chain.py --stages 3x112 2x96 1x64
    python applications/chain.py --teacher gpt2-xl --stages gpt2-large gpt2-medium gpt2 --data my.jsonl

The last student is also trained without a teacher, and by the first teacher directly: once for the steps of its own
stage, once for the floating-point operations of the whole chain. If the run is killed, the same command resumes the
stage that it was in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import distill_lm
from parts import cells, models, options, report, setup
from typing_extensions import Doc


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and the stages."""

    stages: Annotated[list[str], Doc("students from first to last: blocks x width if new, a folder or a hub name")]


DEFAULTS = Settings(output=Path("runs/chain"), samples=6000, stages=["3x112", "2x96", "1x64"])


def stage(args: Settings, student: str) -> distill_lm.Settings:
    """The settings of one stage."""
    layers, cross, width = student.partition("x")
    if not (cross and layers.isdecimal() and width.isdecimal()):
        return options.some(distill_lm.Settings, args, student=student)
    heads = max(n for n in range(1, 5) if int(width) % n == 0)
    new = {"student_layers": int(layers), "student_width": int(width), "student_heads": heads}
    return options.some(distill_lm.Settings, args, **new)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train the students of the chain, then the last one directly and alone."""
    args = options.read(DEFAULTS, arguments, __doc__)
    first = setup.prepare(args, distill_lm.train)
    students = args.output / "students"
    best = distill_lm.teacher_measured(args, first)
    runs = {"teacher": [report.beside(best, best)]}
    taught, path, teraflop = first, [], 0.0
    for name in args.stages:
        path.append(Path(name).name)
        found = distill_lm.measured(stage(args, name), taught, name="-".join(path), students=students)
        runs[" > ".join(path)] = [report.beside(found, best)]
        teraflop += found["teraflop"]
        model = models.load(found["student"])[0].to(args.device).eval()
        taught = replace(first, teacher=model, key=cells.key({"text": first.key, "teacher": found["student"]}))

    last = stage(args, args.stages[-1])
    direct = distill_lm.measured(last, first, name="direct", students=students)
    longer = replace(last, steps=round(direct["steps"] * teraflop / direct["teraflop"]))
    others = {
        "direct": direct,
        "direct, the chain's compute": distill_lm.measured(longer, first, name="direct-longer", students=students),
        "none": distill_lm.measured(replace(last, method="none"), first, students=students),
    }
    runs |= {row: [report.beside(found, best, others["none"])] for row, found in others.items()}
    print(report.write(runs, vars(args), args.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
