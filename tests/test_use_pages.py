"""The library does what the pages on its use say (docs/what_counts.md, memory.md, training.md)."""

import contextlib
import io
import re
import runpy

import elsewhere
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
def test_a_block_prints_what_its_comments_say(page, number, code, monkeypatch, tmp_path):
    elsewhere.go_there(monkeypatch, tmp_path)
    expected = re.findall(r"^ *print\(.*\)  +# (.*)$", code, re.MULTILINE)
    out = io.StringIO()
    teacher, student = build("gpt2", width=24, depth=8), build("gpt2", depth=4, seed=1)
    with contextlib.redirect_stdout(out):
        readme.run(f"{page} block {number}", code, student, teacher, batch("gpt2"))
    assert out.getvalue().splitlines() == expected


@pytest.mark.parametrize("positions", ["labels", "mask"])
def test_the_picture_shows_the_logits_that_have_a_gradient(positions):
    picture = runpy.run_path(str(PICTURE))
    labels = torch.tensor([[-100 if x == -100 else 3 for x in row] for row in picture["LABELS"]])
    mask = torch.tensor(picture["ATTENTION"]).bool()
    student, teacher = torch.randn(2, *labels.shape, 5)
    criterion = kdloss.Sum(1.0 * kdloss.Logits(positions=positions), causal=True)
    criterion(student.requires_grad_(), teacher, labels, attention_mask=mask).backward()
    counted = picture["BY_LABELS" if positions == "labels" else "BY_MASK"]
    assert (student.grad.abs().sum(-1) > 0).tolist() == counted


def test_each_term_is_averaged_over_its_own_positions():
    labels, mask = torch.tensor([1, -100, -100, 2]), torch.tensor([True, True, True, True])
    student, teacher = torch.randn(2, 4, 5)
    both = kdloss.Logits() + kdloss.Logits(positions="mask", name="all")
    both(student, teacher, labels, mask=mask)
    values = kdloss.divergences.forward_kl(student, teacher)
    torch.testing.assert_close(both.components["kd"], values[[0, 3]].mean())
    torch.testing.assert_close(both.components["all"], values.mean())
