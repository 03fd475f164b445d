"""Compare ways to distil on equal terms: methods, seeds, and any setting of distill_lm.py.

    python examples/compare.py --methods none vanilla feature both --seeds 0 1 2
    python examples/compare.py --vary temperature 1 2 4 --vary alpha 0.1 0.5     # all pairs: a grid
    python examples/compare.py --one-by-one --vary temperature 1 2 --vary layers last all

All start from the same student and see the same batches; none-same-time trains without a teacher for
the CPU time of the slowest distilled student. Killed at any instant, the same command goes on with
the cells that are missing. All other flags are those of distill_lm.py, which trains the best one.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import distill_lm
from parts import cells, options, report

NONE, SAME_TIME = "none", "none-same-time"
METHODS = [NONE, "vanilla", "feature", "both", SAME_TIME]


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


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Run all cells that are missing, and write what came of all of them."""
    args, flags = parser().parse_known_args(arguments)
    base = settings(flags)
    methods = [method for method in METHODS if method in args.methods]
    if SAME_TIME in methods and (NONE not in methods or len(methods) < 3):
        raise ValueError(f"{SAME_TIME!r} needs {NONE!r} and a method that distils for its time: --methods")
    setups: dict[str, distill_lm.Setup] = {}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for change, seed, method in itertools.product([*changes(args)], args.seeds, methods):
        row = label(method, change)
        if (row, seed) in found:  # a setting that this method doesn't use
            continue
        changed = [f"--{flag}={value}" for flag, value in change.items()]
        cell = settings([*flags, *changed, f"--seed={seed}"])
        cell.method = method
        asked = {name: value for name, value in vars(cell).items() if name in prepared_by()}
        setup = setups.get(cells.key(asked)) or distill_lm.prepare(cell, distill_lm.train)
        setups = {cells.key(asked): setup}  # one teacher in memory at a time
        alone = found.get((label(NONE, change), seed))
        if method == SAME_TIME:
            slowest = max(found[label(m, change), seed]["seconds"] for m in methods[1:-1])
            cell.method, cell.steps = NONE, round(alone["steps"] * slowest / alone["seconds"])
        print(f"{row}, seed {seed}")
        teacher = distill_lm.teacher_measured(cell, setup)
        result = distill_lm.measured(cell, setup)
        found[row, seed] = report.beside(result, teacher, alone)
        found.setdefault(("teacher", 0), report.beside(teacher, teacher))
    rows = dict.fromkeys(row for row, _ in found)
    runs = {row: [result for (name, _), result in found.items() if name == row] for row in rows}
    runs = {"teacher": runs.pop("teacher")} | runs
    print(report.write(runs, vars(base) | vars(args), base.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
