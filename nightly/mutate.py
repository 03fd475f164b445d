"""Mutation testing: change the library in one place at a time, and list the changes that no test notices.

`make mutants ARGS="--sample 200"` draws places in the engine, the divergences, the targets and the terms. A mutant runs
in a process of its own: first the fuzzer's first cases, and if it survives them, some of the tests that reach its line.
An existing log is continued. The survivors are printed.
"""

import argparse
import ast
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import mpmath  # noqa: F401 - this import and the next ones are done once, before processes are forked
import pytest
import scipy.stats  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers  # noqa: F401
from coverage import CoverageData

ROOT = Path(__file__).parent.parent
MINUTES = 10  # a mutant that takes longer may never end
COMPILED = ("compiled.py", "pieces.py", "traced.py")  # their tests run under a compiler, which coverage can't follow
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def changes(node: ast.AST) -> Iterator[Any]:
    """Yield functions that each change a node in one way."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda n: setattr(n, "op", ast.UAdd())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.IfExp):
        yield lambda n: setattr(n, "test", ast.Constant(True))
        yield lambda n: setattr(n, "test", ast.Constant(False))


def code(tree: ast.AST) -> list[ast.AST]:
    """All nodes in order, without type annotations."""
    said = set()
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            said |= set() if part is None else set(ast.walk(part))
    return [node for node in ast.walk(tree) if node not in said]


def places(path: Path) -> Iterator[tuple[Path, int, int]]:
    """All possible changes of a file: the number of the node, and the number of the change."""
    for i, node in enumerate(code(ast.parse(path.read_text()))):
        for j, _ in enumerate(changes(node)):
            yield path, i, j


def mutant(path: Path, i: int, j: int) -> tuple[str, str]:
    """The name of a change (place, before, after), and the changed text of the file."""
    tree = ast.parse(path.read_text())
    node = code(tree)[i]
    before = ast.unparse(node)
    list(changes(node))[j](node)
    where = f"{path.relative_to(ROOT / 'src' / 'kdloss')}:{node.lineno}:{node.col_offset}"
    name = f"{where}: {before} -> {ast.unparse(node)}"
    return name, ast.unparse(ast.fix_missing_locations(tree))


def survives(folder: Path, run: Callable[[], int]) -> bool:
    """Whether `run` returns 0 with the mutant in `folder`, in a process of its own."""
    child = os.fork()
    if child == 0:
        sys.path[:0] = [str(folder), str(ROOT / "nightly"), str(ROOT / "tests")]
        os.chdir(ROOT)
        signal.alarm(60 * MINUTES)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                os._exit(run())
        except BaseException:
            os._exit(2)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit("some tests are not found; remove the file of --reached, and make mutants again")
    return ended == 0


def cases(number: int) -> int:
    """Run the fuzzer's first cases; 0 if none differs."""
    import fuzz

    return fuzz.main(["--cases", str(number)])


def tests(names: list[str]) -> int:
    """Run these tests up to the first that fails; 0 if none does, or if there are none."""
    if not names:
        return 0  # pytest would run all
    seen = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that the imports above brought along
    return pytest.main(["-x", "-q", "-n", "0", "-p", "no:benchmark", "-W", seen, *names])


def reaching(reached: CoverageData, path: Path, i: int, most: int) -> list[str]:
    """At most so many tests that reach the line, or else the file, of a place: of each test function one, then more."""
    node = code(ast.parse(path.read_text()))[i]
    by_line = reached.contexts_by_lineno(str(path))
    here = {name for line in range(node.lineno, node.end_lineno + 1) for name in by_line.get(line, ())}
    found = here - {""} or {name for names in by_line.values() for name in names} - {""}
    names = sorted(name.removesuffix("|run") for name in found if name.endswith("|run"))
    random.Random(0).shuffle(names)
    seen: Counter[str] = Counter()
    turn = {}
    for name in names:
        function = name.partition("[")[0]
        turn[name] = seen[function]
        seen[function] += 1
    first = sorted(names, key=turn.__getitem__)[:most]
    return [*first, "tests/test_compiled.py"] if path.name in COMPILED else first


def main() -> None:
    """Run a sample of all mutants."""
    parser = argparse.ArgumentParser(description="List the changes of the library that no test notices")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--reached", type=Path, default=Path("runs/reached"), help="which test reaches which line")
    parser.add_argument("--log", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--rooms", nargs="+", default=["engine", "divergences", "targets", "terms", "reduction.py"])
    args = parser.parse_args()
    rooms = [ROOT / "src" / "kdloss" / room for room in args.rooms]
    files = sorted(path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room]))
    every = [place for path in files for place in places(path)]
    reached = CoverageData(str(args.reached))
    reached.read()
    drawn = random.Random(args.seed).sample(every, min(args.sample, len(every)))
    args.log.parent.mkdir(parents=True, exist_ok=True)
    done = {x["name"]: x for x in map(json.loads, args.log.read_text().splitlines())} if args.log.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, args.log.open("a") as log:
        folder = Path(scratch)
        shutil.copytree(ROOT / "src" / "kdloss", folder / "kdloss", ignore=shutil.ignore_patterns("__pycache__"))
        sys.dont_write_bytecode = True
        names = reaching(reached, *drawn[0][:2], args.tests)
        if not (survives(folder, partial(cases, args.cases)) and survives(folder, partial(tests, names))):
            raise SystemExit("the library doesn't pass without a mutant either")
        for place in drawn:
            path, (name, text) = place[0], mutant(*place)
            if name in done:
                continue
            there = folder / path.relative_to(ROOT / "src")
            there.write_text(text)
            names = reaching(reached, path, place[1], args.tests)
            alive = survives(folder, partial(cases, args.cases)) and survives(folder, partial(tests, names))
            there.write_text(path.read_text())
            done[name] = {"name": name, "alive": alive}
            print(json.dumps(done[name]), file=log, flush=True)
    names = [mutant(*place)[0] for place in drawn]
    alive = [name for name in names if done[name]["alive"]]
    print(f"{len(names)} of {len(every)} mutants were run, {len(alive)} survived", *alive, sep="\n")


if __name__ == "__main__":
    main()
