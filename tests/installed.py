"""Run the README's Python blocks with the package that pip installed; `make package` runs this file, pytest does not.

Without transformers, two models in plain torch take the place of the reader's, and the Trainer's blocks are skipped.
"""

import sys
import tempfile
from collections import namedtuple
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import readme
import torch
from torch import nn

import kdloss

Output = namedtuple("Output", "loss logits")
HF = find_spec("transformers") is not None


class Trunk(nn.Module):
    """The hidden states of tokens, with the module names of GPT-2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(61, 16)
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth))

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            x = x + block(x)
        return SimpleNamespace(last_hidden_state=x)


class Model(nn.Module):
    """A language model that no library provides."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.transformer = Trunk(depth)
        self.lm_head = nn.Linear(16, 61, bias=False)

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.transformer(input_ids).last_hidden_state)
        shifted = logits[:, :-1].flatten(0, 1), None if labels is None else labels[:, 1:].flatten()
        loss = None if labels is None else nn.functional.cross_entropy(*shifted)
        return Output(loss, logits)


def with_plain_torch(code: str) -> None:
    tokens = torch.randint(61, (2, 8))
    readme.run("README", code, Model(4), Model(8), {"input_ids": tokens, "labels": tokens})


def with_transformers(code: str) -> None:
    from families import batch, build
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 2, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
        data = [{name: x[0] for name, x in batch("gpt2").items()}] * 4
        models = build("gpt2", depth=4, seed=1), build("gpt2", width=24, depth=8)
        readme.run("README", code, *models, batch("gpt2"), arguments=TrainingArguments(folder, **settings), data=data)


def main() -> None:
    """Run the blocks and print how many ran."""
    assert Path(kdloss.__file__).is_relative_to(sys.prefix), f"kdloss was imported from {kdloss.__file__}"
    torch.manual_seed(0)
    found = [code for _, _, code in readme.blocks(readme.ROOT / "README.md")]
    chosen = found if HF else [code for code in found if "arguments" not in code]
    for code in chosen:
        (with_transformers if HF else with_plain_torch)(code)
    for module in ("kdloss.cache", "kdloss.hf") if HF else ():
        import_module(module)
    assert len(chosen) >= 4
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"{len(chosen)} blocks of the README ran on Python {python}, {'with' if HF else 'without'} transformers")


if __name__ == "__main__":
    main()
