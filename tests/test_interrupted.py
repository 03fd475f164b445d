"""After a process was killed or its disk was full, the same command resumes."""

import json

import distill_lm
import pytest
import tiny
from safetensors.torch import load_file

# Runs distill_lm.py and kills itself in the n-th call of a function, after a part of that call's work.
KILLED = """
import os, pathlib, signal, sys
import torch, distill_lm
from parts import cells, files, models

def dies(place, name, calls, part):
    original, left = getattr(place, name), [calls]
    def call(*args, **settings):
        left[0] -= 1
        if left[0] == 0:
            part(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **settings)
    setattr(place, name, call)

{instant}
distill_lm.main(sys.argv[1:])
"""
HALF = "lambda state, file: pathlib.Path(file).write_bytes(b'PK, and half of the rest')"
INSTANTS = {
    "in the teacher's third step": "dies(torch.optim.AdamW, 'step', 3, lambda *a: None)",
    "while the teacher's checkpoint is written": f"dies(torch, 'save', 5, {HALF})",
    "when the teacher's checkpoint is complete, before it is renamed": "dies(os, 'replace', 9, lambda *a: None)",
    "before the old checkpoint is deleted": "dies(pathlib.Path, 'unlink', 12, lambda *a: None)",
    "while the teacher is written": (
        "dies(models, 'save', 1, lambda model, tokenizer, folder: "
        "model.save_pretrained(folder.with_name(folder.name + '.partial')))"
    ),
    "in a student's step": "dies(torch.Tensor, 'backward', 7, lambda *a: None)",
    "while a student's checkpoint is written": f"dies(torch, 'save', 8, {HALF})",
    "after training, before results are written": "dies(files, 'save_json', 2, lambda *a: None)",
}
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import distill_lm
distill_lm.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.data(tmp_path_factory.mktemp("data"))


def command(data, output):
    """A run with projections, random layers and dropout, so that random numbers decide as much as possible."""
    method = {"method": "both", "pairing": "random", "layers": "all", "dropout": 0.1, "save_every": 0}
    return tiny.flags(data, output, **method)


def test_a_run_killed_at_any_instant_ends_with_the_weights_of_an_undisturbed_run(data, tmp_path):
    undisturbed = distill_lm.main(command(data, tmp_path / "undisturbed"))["both"][0]
    output = tmp_path / "killed"
    for name, instant in INSTANTS.items():
        died = tiny.script(KILLED.format(instant=instant), *command(data, output))
        assert died.returncode == -9, (name, died.stderr[-2000:])
    resumed = distill_lm.main(command(data, output))["both"][0]
    ours, theirs = (load_file(f"{x['student']}/model.safetensors") for x in (resumed, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    for a, b in zip(resumed["curve"], undisturbed["curve"], strict=True):
        assert (a["step"], a["perplexity"]) == (b["step"], b["perplexity"])
    leftovers = [file.name for file in output.rglob("*") if ".partial" in file.name or ".checkpoint" in file.name]
    assert not leftovers


def test_a_full_disk_raises_an_error_and_loses_nothing_that_was_finished(data, tmp_path):
    finished = distill_lm.main([*command(data, tmp_path), "--method", "none"])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    size = max(len(content) for name, content in before.items() if name.suffix == ".safetensors")
    full = tiny.script(LIMITED, str(size - 1000), *command(data, tmp_path))
    assert full.returncode == 1
    last = full.stderr.strip().splitlines()[-1]
    assert "could not be written" in last
    assert "free some space, then run the same command again; it resumes" in last
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after.items() >= before.items()
    assert not [name for name in after.keys() - before.keys() if "partial" in name.name]
    runs = distill_lm.main(command(data, tmp_path))
    assert runs["none"] == finished["none"]
    assert json.loads((tmp_path / "results.json").read_text())["runs"]["both"] == runs["both"]
