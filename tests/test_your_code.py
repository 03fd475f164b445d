"""docs/your_code.md: the marked lines are those that were added, and the code runs."""

import difflib
import re
import textwrap

import datasets
import pytest
import pytorch_lightning as pl
import readme
import torch
import transformers as hf
from families import batch, build
from torch.optim import AdamW

PAGE = readme.ROOT / "docs" / "your_code.md"
TABS = dict(re.findall(r'^=== "(.*?)"\n(.*?)(?=^\S)', PAGE.read_text(), re.MULTILINE | re.DOTALL))
every_tab = pytest.mark.parametrize("name", TABS)


def blocks(name):
    """The options and the code of each Python block in a tab."""
    found = re.findall(r"```(?:python|py)([^\n]*)\n(.*?)```", TABS[name], re.DOTALL)
    return [(options, textwrap.dedent(code)) for options, code in found]


def test_there_is_a_tab_for_each_kind_of_training_code():
    assert list(TABS) == ["PyTorch loop", "Own forward passes", "Trainer", "TRL", "Lightning", "Accelerate"]


@every_tab
def test_the_marked_lines_are_those_that_are_not_in_the_code_before(name):
    (plain, before), (options, after) = blocks(name)
    marked = {int(n) for n in re.fullmatch(r' hl_lines="([\d ]+)"', options)[1].split()}
    lines = after.splitlines()
    matcher = difflib.SequenceMatcher(None, before.splitlines(), lines, autojunk=False)
    kept = {j + 1 for _, start, size in matcher.get_matching_blocks() for j in range(start, start + size)}
    assert plain == ""
    assert {n for n in marked if lines[n - 1]} == {n for n, line in enumerate(lines, 1) if line and n not in kept}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # a warning in Lightning under torch 2.13
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_lightning_trains_each_module_of_the_page():
    for _, code in blocks("Lightning"):
        student, teacher = build("gpt2", depth=4, seed=1), build("gpt2", width=24, depth=8)
        names = {"AdamW": AdamW}
        exec(code, names)
        before = [p.detach().clone() for p in student.parameters()]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        given = [student, teacher][: names["Training"].__init__.__code__.co_argcount - 1]
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, enable_progress_bar=False, **quiet)
        trainer.fit(names["Training"](*given), torch.utils.data.DataLoader([batch("gpt2")], batch_size=None))
        assert not all(map(torch.equal, before, student.parameters()))
        assert set(trainer.logged_metrics) == ({"ce", "kd"} if len(given) == 2 else set())


@pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`gradient_checkpointing` is deprecated")
def test_each_trl_trainer_of_the_page_trains(tmp_path):
    trl = pytest.importorskip("trl")  # not installed with the oldest versions
    tokenizer = hf.ByT5Tokenizer()
    data = datasets.Dataset.from_list([{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(4)])
    shape = {"vocab_size": len(tokenizer), "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    more = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
    for _, code in blocks("TRL"):
        teacher, student = (
            hf.LlamaForCausalLM(
                hf.LlamaConfig(hidden_size=w, intermediate_size=w, num_hidden_layers=2, pad_token_id=0, **shape)
            )
            for w in (24, 16)
        )
        before = [p.detach().clone() for p in student.parameters()]
        names = {"arguments": trl.SFTConfig(str(tmp_path), max_steps=1, logging_steps=1, **more), "data": data}
        exec(code, names | {"student": student, "teacher": teacher, "tokenizer": tokenizer})
        assert not all(map(torch.equal, before, student.parameters()))
