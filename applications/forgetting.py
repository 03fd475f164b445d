"""Teach a model something new by LoRA adapters, and see what it forgets: its own base as teacher, beside replay.

    python applications/forgetting.py --seeds 0 1 2
    python applications/forgetting.py --teacher my/model --data old.jsonl --new new.jsonl --steps 60

The base has read Wikipedia and is to learn Python's code. In each step adapters learn a batch of code, and beside it
nothing more ("alone"), cross-entropy on a batch of the old text ("replay"), or on the same batch to predict what the
base predicts ("near its base"): `kdloss.base_of` runs it with the adapters off, so there is no second copy of it.

Killed at any instant, the same command goes on.
"""

import copy
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import distill_lm
import torch
from parts import cells, evaluation, options, report, text
from parts.setup import Setup, prepare
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import Doc

import kdloss

NOTES = f"""\
{distill_lm.NOTES}
Perplexity and what is written are those of new text; old perplexity is that of texts as the base has read. A batch
of old text is beside each new one but under "alone", which has half of the tokens in as many steps."""


@dataclass(kw_only=True)
class Settings(options.Evaluation, options.Training, options.Teacher, options.Text):
    """Those of distill_lm.py that fit, those of the new text and of the adapters."""

    new: Annotated[str | None, Doc("file or dataset that is new; else Python's own code")] = None
    new_samples: Annotated[int, options.COUNT, Doc("use so many texts of it, the last tenth for evaluation")] = 2000
    student_blocks: Annotated[int | None, options.COUNT, Doc("blocks of it, drawn by the seed; else all")] = None
    student_samples: Annotated[int | None, options.COUNT, Doc("old texts to remember by; else all or 320")] = None
    rank: Annotated[int, options.COUNT, Doc("of the adapters")] = 8
    weight: Annotated[float, Doc("of the loss on old text")] = 1.0
    seeds: Annotated[list[int], Doc("repeat for these")]


DEFAULTS = Settings(output=Path("runs/forgetting"), samples=6000, student_blocks=1600, epochs=1, lr=5e-3, seeds=[0])
ROWS = ("alone", "replay", "near its base")


class BesideOld:
    """Stands in the loop of distill_lm.py for a `kdloss.Distiller`: the loss on new text and one on old text."""

    def __init__(self, student: PeftModel, row: str, weight: float) -> None:
        terms = {"replay": kdloss.CrossEntropy(), "near its base": kdloss.Logits()}
        self.new = kdloss.Distiller(None, 1.0 * kdloss.CrossEntropy())
        self.old = kdloss.Distiller(kdloss.base_of(student), weight * terms[row]) if row in terms else None
        self.criterion, self.teachers = self.new.criterion, self.new.teachers  # the base is the student's own memory

    def prepare(self, student: PeftModel) -> None:
        """Nothing is trained beside the student."""

    def __call__(self, student: PeftModel, input_ids: Tensor, labels: Tensor, old: Tensor) -> kdloss.Distilled:
        """One step."""
        out = self.new(student, input_ids=input_ids, labels=labels)
        if self.old is not None:
            out.loss = out.loss + self.old(student, input_ids=old, labels=old).loss
        return out


def code() -> list[str]:
    """Definitions of Python's standard library, one after the other, always in the same order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = list(dict.fromkeys(part for file in files for part in file.read_text("utf-8").split("\n\n\n")))
    random.Random(0).shuffle(found)
    return found


def of_new(args: Settings, old: Setup) -> Setup:
    """The new text in blocks, a tenth of it held out."""
    texts = (code() if args.new is None else text.read_texts(args.new))[: args.new_samples]
    token_ids = text.tokenize(old.tokenizer, texts)
    tenth = -(-len(texts) // 10)
    seen, unseen = (text.pack(part, args.max_length) for part in (token_ids[:-tenth], token_ids[-tenth:]))
    prompts, reference = evaluation.continuations(token_ids[-tenth:], args.continuations, args.max_length)
    key = cells.key({"text": old.key, "new": token_ids})
    own = {"blocks": seen.to(args.device), "heldout": unseen, "prompts": prompts, "reference": reference, "key": key}
    return replace(old, **own)


def batches(args: Settings, new: Setup, old: Setup, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of new text, in each one as much of the old."""
    blocks = text.draw(new.blocks, args.student_blocks, args.seed)
    both = (text.batches(x, args.batch_size, steps, args.seed) for x in (blocks, old.blocks))
    return ({**batch, "old": beside["input_ids"]} for batch, beside in zip(*both, strict=True))


def adapted(base: PreTrainedModel, args: Settings) -> PeftModel:
    """A copy of the base under new adapters: the same ones for the same seed."""
    torch.manual_seed(args.seed)
    transposed = any(isinstance(module, Conv1D) for module in base.modules())  # as GPT-2's weights are
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", fan_in_fan_out=transposed)
    return get_peft_model(copy.deepcopy(base), config)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train adapters in each of the ways, and write what they learn and what they forget."""
    args = options.read(DEFAULTS, arguments, __doc__)
    old = prepare(args, distill_lm.train)
    new = of_new(args, old)
    elsewhere = {*distill_lm.ELSEWHERE, "seeds"}

    def measured(row: str, args: Settings) -> dict[str, Any]:
        def work(folder: Path) -> dict[str, Any]:
            student = adapted(old.teacher, args)
            loop, order = BesideOld(student, row, args.weight), partial(batches, args, new, old)
            found = distill_lm.fit(loop, student, args, new, folder, None, f"{row} ({args.seed})", order)
            return found | {"old_perplexity": evaluation.perplexity(student, old.heldout)}

        settings = {name: x for name, x in vars(args).items() if name not in elsewhere} | {"text": new.key}
        return cells.cell(args.output / "cells", row.replace(" ", "-"), settings, work)

    base = distill_lm.teacher_measured(args, new)
    base |= {"old_perplexity": distill_lm.teacher_measured(args, old)["perplexity"]}
    runs: dict[str, list[dict[str, Any]]] = {"base": [base], **{row: [] for row in ROWS}}
    for seed in args.seeds:
        for row in ROWS:
            runs[row].append(measured(row, replace(args, seed=seed)))
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
