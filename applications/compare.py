"""Compare ways to distil on equal terms: methods, seeds, and any setting of distill_lm.py.

    python applications/compare.py --methods none vanilla feature both --seeds 0 1 2
    python applications/compare.py --vary temperature 1 2 4 --vary alpha 0.1 0.5     # all pairs: a grid
    python applications/compare.py --one-by-one --vary temperature 1 2 --vary layers last all

All start from the same student and see the same batches; none-same-compute trains without a teacher
for as many floating-point operations, counted, as the dearest distilled student and its teacher took.
Killed at any instant, the same command goes on with the cells that are missing. All other flags are
those of distill_lm.py, which trains the best one.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import distill_lm
from parts import cells, options, report
from typing_extensions import Doc
from tyro.conf import UseAppendAction

NONE, SAME_COMPUTE = "none", "none-same-compute"
DISTILLED = ["vanilla", "feature", "both"]
METHODS = [NONE, *DISTILLED, SAME_COMPUTE]


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """Those of distill_lm.py, and what to compare."""

    methods: Annotated[list[Literal[tuple(METHODS)]], Doc("which rows")]
    seeds: Annotated[list[int], Doc("repeat for these")]
    vary: Annotated[
        UseAppendAction[list[list[str]]], Doc("a flag of distill_lm.py and the values it takes: temperature 1 2 4")
    ]
    one_by_one: Annotated[bool, Doc("vary one flag at a time, not all together")] = False


DEFAULTS = Settings(output=Path("runs/compare"), methods=METHODS, seeds=[0], vary=[])
PREPARED_BY = {field.name for kind in (options.Text, options.Teacher) for field in fields(kind)}
PREPARED_BY |= {"batch_size", "continuations"}  # where these stay the same, text and teacher are read once


def changes(args: Settings) -> Iterator[dict[str, str]]:
    """What each cell changes of the given settings: nothing, or one value of every varied flag."""
    axes = [[{flag: value} for value in values] for flag, *values in args.vary]
    if args.one_by_one:
        yield {}
        yield from itertools.chain(*axes)
    else:
        yield from ({k: v for one in point for k, v in one.items()} for point in itertools.product(*axes))


def label(method: str, change: dict[str, str]) -> str:
    """A row's name: the method and what it changes, without what it doesn't use."""
    unused = distill_lm.UNUSED[method.removesuffix("-same-compute")]
    used = [f"{flag} {value}" for flag, value in change.items() if flag.replace("-", "_") not in unused]
    return ", ".join([method, *used])


@dataclass
class Cell:
    """One student to train."""

    row: str
    change: dict[str, str]
    method: str
    seed: int
    args: distill_lm.Settings


def plan(args: Settings) -> list[Cell]:
    """All cells, each one's settings checked before the first is run."""
    planned = {}
    for change, seed, method in itertools.product([*changes(args)], args.seeds, METHODS):
        row = label(method, change)
        if method not in args.methods or (row, seed) in planned:  # it varies what this method doesn't use
            continue
        base = options.some(distill_lm.Settings, args, seed=seed, method=method.removesuffix("-same-compute"))
        chosen = options.read(base, [f"--{flag}={value}" for flag, value in change.items()], __doc__)
        distill_lm.criterion_for(chosen)
        planned[row, seed] = Cell(row, change, method, seed, chosen)
    return list(planned.values())


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Run all cells that are missing, and write what came of all of them."""
    args = options.read(DEFAULTS, arguments, __doc__)
    distilled = [method for method in args.methods if method in DISTILLED]
    if SAME_COMPUTE in args.methods and not (NONE in args.methods and distilled):
        raise ValueError(f"{SAME_COMPUTE!r} needs {NONE!r} and a method that distils to be like: --methods")
    todo, setups = plan(args), {}
    runs: dict[str, list[dict[str, Any]]] = {"teacher": [], **{cell.row: [] for cell in todo}}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for nth, cell in enumerate(todo, start=1):
        print(f"{nth} of {len(todo)}: {cell.row}, seed {cell.seed}")
        asked = cells.key({name: x for name, x in vars(cell.args).items() if name in PREPARED_BY})
        setup = setups.get(asked) or distill_lm.prepare(cell.args, distill_lm.train)
        setups = {asked: setup}  # one teacher in memory at a time
        teacher = distill_lm.teacher_measured(cell.args, setup)
        runs["teacher"] = runs["teacher"] or [report.beside(teacher, teacher)]
        alone = found.get((label(NONE, cell.change), cell.seed))
        if cell.method == SAME_COMPUTE:
            dearest = max(found[label(m, cell.change), cell.seed]["teraflop"] for m in distilled)
            cell.args.steps = round(alone["steps"] * dearest / alone["teraflop"])
        found[cell.row, cell.seed] = distill_lm.measured(cell.args, setup)
        runs[cell.row].append(report.beside(found[cell.row, cell.seed], teacher, alone))
    print(report.write(runs, vars(args), args.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
