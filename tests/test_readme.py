"""The README's and the docs' Python blocks run as they stand."""

import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from families import batch, build
from torch.optim import AdamW
from transformers import TrainingArguments

import kdloss

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (page.name, number, code)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize(("page", "number", "code"), BLOCKS, ids=[f"{p}-{n}" for p, n, _ in BLOCKS])
def test_a_block_of_python_runs(page, number, code, tmp_path):
    """With what the text says the reader has: two models, their batches, an optimizer's class, ..."""
    teacher, student = build("gpt2", width=24, depth=8), build("gpt2", depth=4, seed=1)
    before = [p.detach().clone() for p in student.parameters()]
    names = {"teacher": teacher, "student": student, "loader": [batch("gpt2")] * 2, "AdamW": AdamW}
    with torch.no_grad():
        plain = {k: v for k, v in batch("gpt2").items() if k != "labels"}
        names["teacher_logits"] = teacher(**plain).logits
    names["student_logits"] = student(**plain).logits
    names["labels"] = batch("gpt2")["labels"]
    alone = SimpleNamespace(all_reduce=lambda x: None, get_world_size=lambda: 1)
    wrapped = kdloss.Distillation(student, teacher, kdloss.VanillaKD())
    names |= {"nn": torch.nn, "dist": alone, "module": wrapped, "batch": batch("gpt2")}
    small = {"max_steps": 2, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    names["arguments"] = TrainingArguments(str(tmp_path), **small)
    names["data"] = [{name: x[0] for name, x in batch("gpt2").items()}] * 4
    exec(compile(code, f"{page} block {number}", "exec"), names)
    if "optimizer.step()" in code or "trainer.train(" in code:
        assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    elif "loss" in names:
        assert names["loss"].isfinite()


def test_there_are_blocks_to_run():
    assert [page for page, _, _ in BLOCKS].count("README.md") >= 3


def test_every_public_name_has_a_row_in_the_readme_and_a_place_in_the_api_page():
    readme, api = (ROOT / "README.md").read_text(), (ROOT / "docs" / "api.md").read_text()
    box = readme[readme.index("## What is in the box") : readme.index("## What it promises")]
    rooms = {n: room for n in kdloss.__all__ if isinstance(room := getattr(kdloss, n), ModuleType)}
    top = [n for n in kdloss.__all__ if n not in rooms]
    inside = {f"{name}.{n}" for name, room in rooms.items() for n in room.__all__ if not hasattr(kdloss, n)}
    unseen = {"Captured", "Distilled", "terms.Contract", "terms.Plan", "terms.Reads", "terms.Step"}
    assert [n for n in rooms if f"`{n}" not in box] == []
    assert [n for n in (*top, *sorted(inside)) if f"`{n.split('.')[-1]}" not in box and n not in unseen] == []
    assert [n for n in (*top, *sorted(inside)) if f"::: kdloss.{n}\n" not in api] == []


def test_the_top_has_about_twenty_names_and_no_package_hides_behind_a_function():
    names = [n for n in kdloss.__all__ if not isinstance(getattr(kdloss, n), ModuleType)]
    assert len(names) <= 26
    files = {path.stem for path in Path(kdloss.__file__).parent.iterdir()}
    assert [n for n in names if n in files] == []
