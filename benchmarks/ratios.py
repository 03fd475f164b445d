"""A table of ratios of time and memory: kdloss against the code that one would write otherwise. Run `make bench`.

python benchmarks/ratios.py [section ...]

One thread, CPU time, both ways in turn, medians of paired ratios; peaks come from PyTorch's allocator. Every section
runs in a process of its own, some sections twice. With memory "fresh", C's allocator has its defaults: large buffers
are new pages every time, and a plain recipe spends half of its time on them. With memory "kept", freed buffers are
reused, as on every GPU. A run of all sections writes docs/results/bench.md.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import liger
import torch
from measure import HEADER, Row, multiplies_bf16
from sections import functions, heads, logits, steps

Section = Callable[[str], Iterator[Row]]
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}  # read by glibc when a process starts
PAGE = Path(__file__).parent.parent / "docs" / "results" / "bench.md"
BOTH, FRESH = ("kept", "fresh"), ("fresh",)
SECTIONS: dict[str, tuple[Section, tuple[str, ...]]] = {
    "logits": (logits.against_recipes, BOTH),
    "logarithms": (logits.against_logarithms, BOTH),
    "large": (logits.large, BOTH),
    "bfloat16": (logits.error_in_bfloat16, FRESH),
    "moved": (logits.moved, FRESH),
    "lazy": (heads.against_products, BOTH),
    "lengths": (heads.lengths, FRESH),
    "more": (heads.what_comes_with_it, FRESH),
    "teachers": (heads.teachers, FRESH),
    "dense": (functions.dense, BOTH),
    "top_k": (functions.top_k, BOTH),
    "vocabulary": (functions.vocabularies, BOTH),
    "distances": (functions.features, BOTH),
    "small": (steps.small_batches, FRESH),
    "features": (steps.features, FRESH),
    "cache": (steps.cache, FRESH),
}


def conditions() -> str:
    """The machine, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    with_liger = f"liger-kernel {version('liger-kernel')}" if liger.here() else "without Liger"
    missing = "" if multiplies_bf16() else " This CPU doesn't multiply bf16, so the lazy rows in bf16 are left out."
    return f"{(names or [platform.processor()])[0]}, one thread, torch {torch.__version__}, {with_liger}.{missing}"


def in_a_process(section: str, memory: str) -> list[str]:
    """Run a section in a new process; print its rows as they come, and return them. Exit if it fails."""
    quiet = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    env = os.environ | quiet | (KEPT if memory == "kept" else {})
    command = [sys.executable, __file__, "--here", section, memory]
    rows = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("|"):
                print(line, end="", flush=True)
                rows.append(line)
    if process.returncode:
        raise SystemExit(f"the section {section}, memory {memory}, ended with {process.returncode}")
    return rows


def here(section: str, memory: str) -> None:
    """Measure a section in this process, and print its rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for row in SECTIONS[section][0](memory):
        print(row, flush=True)


def main() -> None:
    """Print the table, row by row."""
    chosen = sys.argv[1:] or list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    print(f"{conditions()}\n\n{HEADER}", flush=True)
    rows = [row for name in chosen for memory in SECTIONS[name][1] for row in in_a_process(name, memory)]
    if not sys.argv[1:]:
        table = "".join([HEADER, "\n", *rows])
        PAGE.write_text(f"{conditions()} Goals that are missed are in bold.\n\n{table}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        here(*sys.argv[2:])
    else:
        main()
