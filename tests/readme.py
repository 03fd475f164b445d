"""Run the Python blocks of the README and the docs with the names that the text assumes."""

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import kdloss

ROOT = Path(__file__).parent.parent


def blocks(*pages: Path) -> list[tuple[str, int, str]]:
    """Page, number and code of each Python block; a block may be indented in a tab and may highlight lines."""
    return [
        (page.name, number, textwrap.dedent(code))
        for page in pages
        for number, code in enumerate(re.findall(r"```python(?: [^\n]*)?\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def recipe(page: str, title: str, **names: object) -> SimpleNamespace:
    """The names that the first Python block under a heading `### title` of a page in docs defines."""
    text = (ROOT / "docs" / page).read_text()
    section = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"docs/{page} has no heading '### {title}'"
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert code, f"no Python under '### {title}' in docs/{page}"
    exec(compile(code[1], f"docs/{page}, {title}", "exec"), names)
    return SimpleNamespace(**names)


def run(name: str, code: str, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], **more: object) -> None:
    """Run a block with two models, a batch and more names; a block that trains must change the student."""
    before = [p.detach().clone() for p in student.parameters()]
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        teacher_logits = teacher(**plain).logits
    names = {
        "teacher": teacher,
        "student": student,
        "batch": batch,
        "loader": [batch] * 2,
        "labels": batch["labels"],
        "teacher_logits": teacher_logits,
        "student_logits": student(**plain).logits,
        "nn": nn,
        "AdamW": AdamW,
        "dist": SimpleNamespace(all_reduce=lambda x: None, get_world_size=lambda: 1),
        "module": kdloss.Distillation(student, teacher, kdloss.VanillaKD()),
        **more,
    }
    exec(compile(code, name, "exec"), names)
    if names["student"] is not student:
        return  # the block builds its own models
    if "optimizer.step()" in code or "trainer.train(" in code:
        assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    elif "loss" in names:
        assert names["loss"].isfinite()
