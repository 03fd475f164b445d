"""The Python blocks of the README and the docs run unchanged."""

from pathlib import Path
from types import ModuleType

import elsewhere
import pytest
import readme
from families import batch, build
from transformers import TrainingArguments

import kdloss

ROOT = readme.ROOT
BLOCKS = readme.blocks(ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # a warning in peft
@pytest.mark.parametrize(("page", "number", "code"), BLOCKS, ids=[f"{p}-{n}" for p, n, _ in BLOCKS])
def test_a_block_of_python_runs(page, number, code, tmp_path):
    teacher, student = build("gpt2", width=24, depth=8), build("gpt2", depth=4, seed=1)
    small = {"max_steps": 2, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), **small)
    data = [{name: x[0] for name, x in batch("gpt2").items()}] * 4
    readme.run(f"{page} block {number}", code, student, teacher, batch("gpt2"), arguments=arguments, data=data)


def test_there_are_blocks_to_run():
    assert [page for page, _, _ in BLOCKS].count("README.md") >= 3


def test_every_public_name_is_in_the_readme_and_in_the_api_page():
    page, api = (ROOT / "README.md").read_text(), (ROOT / "docs" / "api.md").read_text()
    box = page[page.index("## What is in the box") : page.index("## What it promises")]
    modules = {n: module for n in kdloss.__all__ if isinstance(module := getattr(kdloss, n), ModuleType)}
    top = [n for n in kdloss.__all__ if n not in modules]
    inside = {f"{name}.{n}" for name, module in modules.items() for n in module.__all__ if not hasattr(kdloss, n)}
    unlisted = {"Captured", "Distilled", "terms.Contract", "terms.Plan", "terms.Reads", "terms.Step"}
    assert [n for n in modules if f"`{n}" not in box] == []
    assert [n for n in (*top, *sorted(inside)) if f"`{n.split('.')[-1]}" not in box and n not in unlisted] == []
    assert [n for n in (*top, *sorted(inside)) if f"::: kdloss.{n}\n" not in api] == []


def test_the_top_level_has_at_most_28_names_and_none_is_also_the_name_of_a_file():
    names = [n for n in kdloss.__all__ if not isinstance(getattr(kdloss, n), ModuleType)]
    assert len(names) <= 28
    files = {path.stem for path in Path(kdloss.__file__).parent.iterdir()}
    assert [n for n in names if n in files] == []


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    elsewhere.go_there(monkeypatch, tmp_path)
