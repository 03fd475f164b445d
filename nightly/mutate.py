"""Mutation testing: change the library in one place at a time, and list the changes that no test notices.

`PYTHONPATH=tests python nightly/mutate.py --sample 200 --log runs/mutants.jsonl` draws places in the engine, the
divergences, the targets and the terms. A mutant runs in a process of its own: first the fuzzer's first cases, and if it
survives them, the tests that TESTS lists for its folder. An existing log is continued. The survivors are printed.
"""

import argparse
import ast
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np  # noqa: F401 - imported once, before processes are forked
import torch  # noqa: F401

ROOT = Path(__file__).parent.parent
TESTS = {
    "engine": ["engine", "extremes", "lazy_head"],
    "divergences": ["divergences", "extremes", "powers", "sinkhorn", "teacher_temperature"],
    "targets": ["targets", "stored_types"],
    "terms": ["sums", "criteria", "masks", "known"],
    "": ["laws", "cross_entropy", "criteria"],
}
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
    name = f"{path.relative_to(ROOT / 'src' / 'kdloss')}:{node.lineno}: {before} -> {ast.unparse(node)}"
    return name, ast.unparse(ast.fix_missing_locations(tree))


def survives_cases(folder: Path, cases: int) -> bool:
    """Whether the fuzzer's first cases pass with the mutant, in a process of their own."""
    child = os.fork()
    if child == 0:
        sys.path[:0] = [str(folder), str(ROOT / "nightly"), str(ROOT / "tests")]
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                import fuzz

                os._exit(fuzz.main(["--cases", str(cases)]))
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def survives_tests(folder: Path, names: list[str]) -> bool:
    """Whether the tests pass with the mutant."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    told = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=ROOT, env=told, capture_output=True).returncode == 0


def main() -> None:
    """Run a sample of all mutants."""
    parser = argparse.ArgumentParser(description="List the changes of the library that no test notices")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--log", type=Path, default=Path("runs/mutants.jsonl"))
    parser.add_argument("--rooms", nargs="+", default=["engine", "divergences", "targets", "terms", "reduction.py"])
    parser.add_argument("--no-tests", action="store_true", help="run the fuzzer only")
    args = parser.parse_args()
    rooms = [ROOT / "src" / "kdloss" / room for room in args.rooms]
    files = sorted(path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room]))
    every = [place for path in files for place in places(path)]
    drawn = random.Random(args.seed).sample(every, min(args.sample, len(every)))
    args.log.parent.mkdir(parents=True, exist_ok=True)
    done = {x["name"]: x for x in map(json.loads, args.log.read_text().splitlines())} if args.log.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, args.log.open("a") as log:
        folder = Path(scratch)
        shutil.copytree(ROOT / "src" / "kdloss", folder / "kdloss", ignore=shutil.ignore_patterns("__pycache__"))
        sys.dont_write_bytecode = True
        for place in drawn:
            path, (name, text) = place[0], mutant(*place)
            if name in done:
                continue
            there = folder / path.relative_to(ROOT / "src")
            there.write_text(text)
            tests = TESTS.get(path.parent.name, TESTS[""])
            alive = survives_cases(folder, args.cases) and (args.no_tests or survives_tests(folder, tests))
            there.write_text(path.read_text())
            done[name] = {"name": name, "alive": alive}
            print(json.dumps(done[name]), file=log, flush=True)
    names = [mutant(*place)[0] for place in drawn]
    alive = [name for name in names if done[name]["alive"]]
    print(f"{len(names)} of {len(every)} mutants were run, {len(alive)} survived", *alive, sep="\n")


if __name__ == "__main__":
    main()
