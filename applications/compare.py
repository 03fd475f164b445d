"""Compare ways to distil: methods, seeds, and values of any flag of distill_lm.py.

    python applications/compare.py --methods none vanilla feature both --seeds 0 1 2
    python applications/compare.py --vary temperature 1 2 4 --vary alpha 0.1 0.5     # all pairs: a grid
    python applications/compare.py --one-by-one --vary temperature 1 2 --vary layers last all

All runs start from the same student and see the same batches. The row none-same-compute trains without a teacher for
as many floating-point operations as the most expensive distilled student and its teacher took. If the run is killed,
the same command resumes with the missing cells. All other flags are those of distill_lm.py. To train the best student
and keep it, run distill_lm.py.
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
    """The settings of distill_lm.py, and what to compare."""

    methods: Annotated[list[Literal[tuple(METHODS)]], Doc("rows of the table")]
    seeds: Annotated[list[int], Doc("seeds to repeat everything with")]
    vary: Annotated[
        UseAppendAction[list[list[str]]], Doc("a flag of distill_lm.py and its values, for example: temperature 1 2 4")
    ]
    one_by_one: Annotated[bool, Doc("vary one flag at a time, not all combinations")] = False


DEFAULTS = Settings(output=Path("runs/compare"), methods=METHODS, seeds=[0], vary=[])
PREPARED_BY = {field.name for kind in (options.Text, options.Teacher) for field in fields(kind)}
PREPARED_BY |= {"batch_size", "continuations"}  # cells with the same values of these share the text and the teacher


def changes(args: Settings) -> Iterator[dict[str, str]]:
    """The settings that each cell changes: none, or one value of every varied flag."""
    axes = [[{flag: value} for value in values] for flag, *values in args.vary]
    if args.one_by_one:
        yield {}
        yield from itertools.chain(*axes)
    else:
        yield from ({k: v for one in point for k, v in one.items()} for point in itertools.product(*axes))


def label(method: str, change: dict[str, str]) -> str:
    """The name of a row: the method and the changed settings that it uses."""
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
    """All cells; the settings of all are checked before the first one runs."""
    planned = {}
    for change, seed, method in itertools.product([*changes(args)], args.seeds, METHODS):
        row = label(method, change)
        if method not in args.methods or (row, seed) in planned:  # this method does not use the varied flag
            continue
        base = options.some(distill_lm.Settings, args, seed=seed, method=method.removesuffix("-same-compute"))
        chosen = options.read(base, [f"--{flag}={value}" for flag, value in change.items()], __doc__)
        distill_lm.criterion_for(chosen)
        planned[row, seed] = Cell(row, change, method, seed, chosen)
    return list(planned.values())


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Run all missing cells, and write the results of all cells."""
    args = options.read(DEFAULTS, arguments, __doc__)
    distilled = [method for method in args.methods if method in DISTILLED]
    if SAME_COMPUTE in args.methods and not (NONE in args.methods and distilled):
        raise ValueError(f"{SAME_COMPUTE!r} needs {NONE!r} and a method that distils: add both to --methods")
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
