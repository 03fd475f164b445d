"""The tables of docs/memory.md are those of its formulas, and a step takes what they say."""

import re

import measure
import memory
import pytest
import readme
import torch

import kdloss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_tables_of_memory_are_those_of_its_formulas(dtype):
    page = (readme.ROOT / "docs" / "memory.md").read_text()
    rows = "\n".join(f"    {row}" for row in [*memory.HEADER.splitlines(), *memory.table(dtype)])
    assert rows in page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("way", ["plain", "given", "blocks"])
def test_a_step_takes_what_the_formula_says(way, dtype):
    tokens = 512 if way == "blocks" else 64
    seen, expected = memory.measured(tokens, 50_257, (16, 16), dtype, way)
    rounding = 12 * 2**20 * (1 + torch.get_num_threads())  # what the engine works in, whatever the size of the logits
    assert 0.9 * expected < seen < 1.1 * expected + rounding


def test_overwriting_logits_takes_no_gradient_beside_them():
    student, teacher, labels = torch.randn(256, 32_000), torch.randn(256, 32_000), torch.zeros(256).long()
    student.requires_grad_()
    kept, overwritten = (
        measure.peak(measure.backward(kdloss.VanillaKD(overwrite_logits=overwrite), student, teacher, labels))
        for overwrite in (False, True)
    )
    assert kept - overwritten == pytest.approx(student.nbytes, rel=0.1)


def test_the_reasons_for_full_logits_are_those_that_are_logged():
    page = (readme.ROOT / "docs" / "memory.md").read_text().partition("## What makes full logits")[2]
    source = "".join(path.read_text() for path in (readme.ROOT / "src" / "kdloss").rglob("*.py"))
    reasons = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(reasons) > 8
    assert [reason for reason in reasons if reason not in source] == []
