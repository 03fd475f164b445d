"""Adapters that learn new text, with and without a loss on old text, at a small size."""

import distill_lm
import forgetting
import numpy as np
import oracles
import pytest
import tiny
import torch
from families import build

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns


def never(*args, **settings):
    raise AssertionError("this was done before")


@pytest.mark.parametrize("row", forgetting.ROWS)
def test_the_loss_on_old_text_is_its_cross_entropy_or_the_divergence_from_the_base(row):
    args = forgetting.DEFAULTS
    base = build("gpt2", depth=2).eval()
    student = forgetting.adapted(base, args).eval()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # adapters start at 0
            torch.nn.init.normal_(parameter)
    new, old = torch.randint(0, 61, (2, 5)), torch.randint(0, 61, (2, 5))
    loss = forgetting.NewAndOldLoss(student, row, 0.5)(student, new, new, old).loss

    def ce(ids):
        logs = student(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
        return -logs.gather(-1, ids[:, 1:, None]).mean().item()

    with torch.no_grad():
        expected = ce(new)
        if row == "replay":
            expected += 0.5 * ce(old)
        if row == "near its base":
            s, t = (model(input_ids=old).logits[:, :-1].double().numpy() for model in (student, base))
            assert np.abs(s - t).max() > 0.1
            expected += 0.5 * oracles.forward_kl(s, t).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_adapters_near_their_base_forget_less_and_the_same_command_trains_nothing_again(
    data, teachers, tmp_path, monkeypatch
):
    flags = tiny.flags(data, tmp_path, teachers, student_width=None, student_heads=None, steps=30, new_samples=100)
    runs = {row: found[0] for row, found in forgetting.main(flags).items()}
    assert list(runs) == ["base", *forgetting.ROWS]
    assert all(runs[row]["perplexity"] < 0.9 * runs["base"]["perplexity"] for row in forgetting.ROWS)
    assert runs["alone"]["old_perplexity"] > runs["near its base"]["old_perplexity"]
    assert runs["alone"]["teraflop"] < runs["replay"]["teraflop"] < runs["near its base"]["teraflop"]
    monkeypatch.setattr(distill_lm, "train", never)
    assert {row: found[0] for row, found in forgetting.main(flags).items()} == runs
