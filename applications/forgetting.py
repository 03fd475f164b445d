"""Fine-tune LoRA adapters on new text and measure what the model forgets: base as teacher, replay, or nothing.

    python applications/forgetting.py --seeds 0 1 2
    python applications/forgetting.py --teacher my/model --data old.jsonl --new new.jsonl --steps 60

The base is trained on Wikipedia, and its adapters on Python code. Every step has a batch of code and one more loss:

- "alone": none.
- "replay": cross-entropy on a batch of old text.
- "near its base": the divergence from the base's predictions on a batch of old text. `kdloss.base_of` runs the base
  with the adapters off, so there is no second copy of its weights.

If the run is killed, the same command resumes it.
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
Perplexity and continuations are measured on new text, old perplexity on held-out texts like those that the base was
trained on. "alone" has no old text, so it sees half as many tokens as the others in the same number of steps."""


@dataclass(kw_only=True)
class Settings(options.Evaluation, options.Training, options.Teacher, options.Text):
    """Most settings of distill_lm.py, and those of the new text and of the adapters."""

    new: Annotated[str | None, Doc("file or dataset with the new text; otherwise Python's own code")] = None
    new_samples: Annotated[int, options.COUNT, Doc("new texts; the last tenth is for evaluation")] = 2000
    student_blocks: Annotated[int | None, options.COUNT, Doc("at most so many new blocks; otherwise all")] = None
    student_samples: Annotated[int | None, options.COUNT, Doc("old texts to train on; otherwise all or 320")] = None
    rank: Annotated[int, options.COUNT, Doc("rank of the adapters")] = 8
    weight: Annotated[float, Doc("weight of the loss on old text")] = 1.0
    seeds: Annotated[list[int], Doc("seeds to repeat everything with")]


DEFAULTS = Settings(output=Path("runs/forgetting"), samples=6000, student_blocks=1600, epochs=1, lr=5e-3, seeds=[0])
ROWS = ("alone", "replay", "near its base")


class NewAndOldLoss:
    """Replaces the `kdloss.Distiller` in the loop of distill_lm.py: a loss on new text and one on old text."""

    def __init__(self, student: PeftModel, row: str, weight: float) -> None:
        terms = {"replay": kdloss.CrossEntropy(), "near its base": kdloss.Logits()}
        self.new = kdloss.Distiller(None, 1.0 * kdloss.CrossEntropy())
        self.old = kdloss.Distiller(kdloss.base_of(student), weight * terms[row]) if row in terms else None
        self.criterion, self.teachers = self.new.criterion, self.new.teachers  # none: the base shares its weights

    def prepare(self, student: PeftModel) -> None:
        """Do nothing: only the student is trained."""

    def __call__(self, student: PeftModel, input_ids: Tensor, labels: Tensor, old: Tensor) -> kdloss.Distilled:
        """Compute the loss of one step."""
        out = self.new(student, input_ids=input_ids, labels=labels)
        if self.old is not None:
            out.loss = out.loss + self.old(student, input_ids=old, labels=old).loss
        return out


def code() -> list[str]:
    """The definitions of Python's standard library, shuffled, always in the same order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = list(dict.fromkeys(part for file in files for part in file.read_text("utf-8").split("\n\n\n")))
    random.Random(0).shuffle(found)
    return found


def of_new(args: Settings, old: Setup) -> Setup:
    """The new text in blocks, with a tenth of it held out."""
    texts = (code() if args.new is None else text.read_texts(args.new))[: args.new_samples]
    token_ids = text.tokenize(old.tokenizer, texts)
    tenth = -(-len(texts) // 10)
    seen, unseen = (text.pack(part, args.max_length) for part in (token_ids[:-tenth], token_ids[-tenth:]))
    prompts, reference = evaluation.continuations(token_ids[-tenth:], args.continuations, args.max_length)
    key = cells.key({"text": old.key, "new": token_ids})
    own = {"blocks": seen.to(args.device), "heldout": unseen, "prompts": prompts, "reference": reference, "key": key}
    return replace(old, **own)


def batches(args: Settings, new: Setup, old: Setup, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of new text, each with as much old text."""
    blocks = text.draw(new.blocks, min(args.student_blocks or len(new.blocks), len(new.blocks)), args.seed)
    both = (text.batches(x, args.batch_size, steps, args.seed) for x in (blocks, old.blocks))
    return ({**batch, "old": beside["input_ids"]} for batch, beside in zip(*both, strict=True))


def adapted(base: PreTrainedModel, args: Settings) -> PeftModel:
    """A copy of the base with new adapters; the same seed gives the same adapters."""
    torch.manual_seed(args.seed)
    transposed = any(isinstance(module, Conv1D) for module in base.modules())  # GPT-2 stores its weights transposed
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", fan_in_fan_out=transposed)
    return get_peft_model(copy.deepcopy(base), config)


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train adapters in each of the three ways, and write the perplexities on new and old text."""
    args = options.read(DEFAULTS, arguments, __doc__)
    old = prepare(args, distill_lm.train)
    new = of_new(args, old)
    elsewhere = {*distill_lm.ELSEWHERE, "seeds"}

    def measured(row: str, args: Settings) -> dict[str, Any]:
        def work(folder: Path) -> dict[str, Any]:
            student = adapted(old.teacher, args)
            loop, order = NewAndOldLoss(student, row, args.weight), partial(batches, args, new, old)
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
