"""Settings with which the examples run in a second: a short text, a tiny teacher, a tiny student."""

import json
import multiprocessing
import os
import sys
import tempfile
from types import SimpleNamespace
from unittest.mock import patch

import torch

SENTENCES = [
    f"Number {i} is {'even' if i % 2 == 0 else 'odd'}, and the number {i + 1} follows right after it."
    for i in range(400)
]


def data(folder):
    """Write a .jsonl file of sentences and return its path."""
    file = folder / "numbers.jsonl"
    file.write_text("\n".join(json.dumps({"id": str(i), "note": s}) for i, s in enumerate(SENTENCES)))
    return file


def flags(file, output, teachers=None, **more):
    """Return the command line of a tiny run."""
    settings = {
        "data": file, "samples": 400, "heldout_samples": 40, "max_length": 16, "vocabulary": 300,
        "teacher_width": 32, "teacher_layers": 3, "teacher_heads": 2, "teacher_lr": 5e-3,
        "teacher_epochs": 2, "student_width": 16, "student_heads": 2, "student_samples": 60,
        "steps": 20, "lr": 5e-3, "points": 2, "continuations": 4,
        "teachers": teachers or output / "teachers", "output": output,
    } | more  # fmt: skip
    given = {name.replace("_", "-"): str(x) for name, x in settings.items() if x is not None}
    return [part for name, x in given.items() for part in (f"--{name}", x)]


def script(code, *arguments):
    """Run Python code in a separate process with everything imported; return its exit code and standard error."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["distill_lm"])
    with tempfile.NamedTemporaryFile() as said:
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
            process = server.Process(target=_runs, args=(code, arguments, said.name))
            process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stderr=said.read().decode())


def _runs(code, arguments, said):
    os.dup2(os.open(said, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})
