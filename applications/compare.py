"""Compare ways to distil on equal terms: methods, seeds, and any setting of distill_lm.py.

    python applications/compare.py --methods none vanilla feature both --seeds 0 1 2
    python applications/compare.py --vary temperature 1 2 4 --vary alpha 0.1 0.5     # all pairs: a grid
    python applications/compare.py --one-by-one --vary temperature 1 2 --vary layers last all

All start from the same student and see the same batches; none-same-time trains without a teacher for
the CPU time of the slowest distilled student. Killed at any instant, the same command goes on with
the cells that are missing. All other flags are those of distill_lm.py, which trains the best one.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import distill_lm
from parts import cells, options, report

NONE, SAME_TIME = "none", "none-same-time"
DISTILLED = ["vanilla", "feature", "both"]
METHODS = [NONE, *DISTILLED, SAME_TIME]


def parser() -> argparse.ArgumentParser:
    """What to compare."""
    made = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = made.add_argument_group("comparison").add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="(all)")
    add("--seeds", type=int, nargs="+", default=[0], help="repeat for these (%(default)s)")
    add(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        metavar=("FLAG", "VALUE"),
        help="a flag of distill_lm.py and the values it takes; may be repeated",
    )
    add("--one-by-one", action="store_true", help="vary one flag at a time, not all together")
    return made


def changes(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """What each cell changes of the given settings: nothing, or one value of every varied flag."""
    axes = [[{flag: value} for value in values] for flag, *values in args.vary]
    if args.one_by_one:
        yield {}
        yield from itertools.chain(*axes)
    else:
        yield from ({k: v for one in point for k, v in one.items()} for point in itertools.product(*axes))


def settings(flags: Sequence[str]) -> argparse.Namespace:
    """The settings of one cell, as distill_lm.py reads them."""
    made = distill_lm.parser(parents=[parser()], description=__doc__)
    args = made.parse_args(["--output", "runs/compare", *flags])
    for ours in ("methods", "seeds", "vary", "one_by_one"):
        delattr(args, ours)
    return args


def prepared_by() -> set[str]:
    """The settings of text and teacher: where they stay the same, both are read once."""
    made = argparse.ArgumentParser()
    options.text_flags(made)
    options.teacher_flags(made)
    return {*vars(made.parse_args([])), "batch_size", "continuations"}


def label(method: str, change: dict[str, str]) -> str:
    """A row's name: the method and what it changes, without what it doesn't use."""
    unused = distill_lm.UNUSED[method.removesuffix("-same-time")]
    used = [f"{flag} {value}" for flag, value in change.items() if flag.replace("-", "_") not in unused]
    return ", ".join([method, *used])


@dataclass
class Cell:
    """One student to train."""

    row: str
    change: dict[str, str]
    method: str
    seed: int
    args: argparse.Namespace


def plan(args: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """All cells, each one's settings checked before the first is run."""
    planned = {}
    for change, seed, method in itertools.product([*changes(args)], args.seeds, METHODS):
        row = label(method, change)
        if method not in args.methods or (row, seed) in planned:  # it varies what this method doesn't use
            continue
        chosen = settings([*flags, *(f"--{flag}={value}" for flag, value in change.items())])
        chosen.seed, chosen.method = seed, method.removesuffix("-same-time")
        distill_lm.criterion_for(chosen)
        planned[row, seed] = Cell(row, change, method, seed, chosen)
    return list(planned.values())


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Run all cells that are missing, and write what came of all of them."""
    args, flags = parser().parse_known_args(arguments)
    base = settings(flags)
    distilled = [method for method in args.methods if method in DISTILLED]
    if SAME_TIME in args.methods and not (NONE in args.methods and distilled):
        raise ValueError(f"{SAME_TIME!r} needs {NONE!r} and a method that distils for its time: --methods")
    todo, setups = plan(args, flags), {}
    runs: dict[str, list[dict[str, Any]]] = {"teacher": [], **{cell.row: [] for cell in todo}}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for nth, cell in enumerate(todo, start=1):
        print(f"{nth} of {len(todo)}: {cell.row}, seed {cell.seed}")
        asked = cells.key({name: x for name, x in vars(cell.args).items() if name in prepared_by()})
        setup = setups.get(asked) or distill_lm.prepare(cell.args, distill_lm.train)
        setups = {asked: setup}  # one teacher in memory at a time
        teacher = distill_lm.teacher_measured(cell.args, setup)
        runs["teacher"] = runs["teacher"] or [report.beside(teacher, teacher)]
        alone = found.get((label(NONE, cell.change), cell.seed))
        if cell.method == SAME_TIME:
            slowest = max(found[label(m, cell.change), cell.seed]["seconds"] for m in distilled)
            cell.args.steps = round(alone["steps"] * slowest / alone["seconds"])
        found[cell.row, cell.seed] = distill_lm.measured(cell.args, setup)
        runs[cell.row].append(report.beside(found[cell.row, cell.seed], teacher, alone))
    print(report.write(runs, vars(base) | vars(args), base.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
