"""The tables of docs/memory.md equal its formulas, and a measured step takes that much memory."""

import re

import measure
import memory
import pytest
import readme
import torch

import kdloss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_tables_on_the_page_equal_its_formulas(dtype):
    page = (readme.ROOT / "docs" / "memory.md").read_text()
    rows = "\n".join(f"    {row}" for row in [*memory.HEADER.splitlines(), *memory.table(dtype)])
    assert rows in page


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("way", ["plain", "given", "blocks"])
def test_a_step_takes_the_memory_of_the_formula(way, dtype):
    tokens = 512 if way == "blocks" else 64
    seen, expected = memory.measured(tokens, 50_257, (16, 16), dtype, way)
    rounding = 12 * 2**20 * (1 + torch.get_num_threads())  # the engine's buffers, for any size of logits
    assert 0.9 * expected < seen < 1.1 * expected + rounding


def test_overwriting_logits_saves_the_memory_of_their_gradient():
    student, teacher, labels = torch.randn(256, 32_000), torch.randn(256, 32_000), torch.zeros(256).long()
    student.requires_grad_()
    separate, overwritten = (
        measure.peak(
            measure.backward(measure.anew(kdloss.VanillaKD(overwrite_logits=overwrite)), student, teacher, labels)
        )
        for overwrite in (False, True)
    )
    assert separate - overwritten == pytest.approx(student.nbytes, rel=0.1)


def test_the_reasons_for_full_logits_on_the_page_are_the_logged_ones():
    page = (readme.ROOT / "docs" / "memory.md").read_text().partition("## What makes full logits")[2]
    source = "".join(path.read_text() for path in (readme.ROOT / "src" / "kdloss").rglob("*.py"))
    reasons = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(reasons) > 8
    assert [reason for reason in reasons if reason not in source] == []
