"""What the pages on use (docs/what_counts.md, memory.md, training.md) say is what the library does."""

import contextlib
import io
import re
import runpy

import elsewhere
import measure
import memory
import pytest
import readme
import torch
from families import batch, build

import kdloss

PAGES = ["what_counts.md", "memory.md", "training.md"]
BLOCKS = readme.blocks(*(readme.ROOT / "docs" / page for page in PAGES))
PRINTS = [block for block in BLOCKS if re.search(r"^ *print\(.*\)  +#", block[2], re.MULTILINE)]
PICTURE = readme.ROOT / "docs" / "pictures" / "what_counts.py"


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize(("page", "number", "code"), PRINTS, ids=[f"{p}-{n}" for p, n, _ in PRINTS])
def test_what_a_block_prints_stands_behind_it(page, number, code, monkeypatch, tmp_path):
    elsewhere.go_there(monkeypatch, tmp_path)
    said = re.findall(r"^ *print\(.*\)  +# (.*)$", code, re.MULTILINE)
    out = io.StringIO()
    teacher, student = build("gpt2", width=24, depth=8), build("gpt2", depth=4, seed=1)
    with contextlib.redirect_stdout(out):
        readme.run(f"{page} block {number}", code, student, teacher, batch("gpt2"))
    assert out.getvalue().splitlines() == said


@pytest.mark.parametrize("positions", ["labels", "mask"])
def test_the_picture_shows_the_logits_that_have_a_gradient(positions):
    shown = runpy.run_path(str(PICTURE))
    labels = torch.tensor([[-100 if x == -100 else 3 for x in row] for row in shown["LABELS"]])
    mask = torch.tensor(shown["ATTENTION"]).bool()
    student, teacher = torch.randn(2, *labels.shape, 5)
    criterion = kdloss.Sum(1.0 * kdloss.Logits(positions=positions), causal=True)
    criterion(student.requires_grad_(), teacher, labels, attention_mask=mask).backward()
    counted = shown["BY_LABELS" if positions == "labels" else "BY_MASK"]
    assert (student.grad.abs().sum(-1) > 0).tolist() == counted


def test_a_term_counts_its_own_positions():
    labels, mask = torch.tensor([1, -100, -100, 2]), torch.tensor([True, True, True, True])
    student, teacher = torch.randn(2, 4, 5)
    both = kdloss.Logits() + kdloss.Logits(positions="mask", name="all")
    both(student, teacher, labels, mask=mask)
    values = kdloss.divergences.forward_kl(student, teacher)
    torch.testing.assert_close(both.components["kd"], values[[0, 3]].mean())
    torch.testing.assert_close(both.components["all"], values.mean())


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
