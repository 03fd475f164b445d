"""Three phases: train the student alone, distil it, fine-tune it on the blocks that it predicts worst.

The table shows what each phase gained, and compares with a single method for the same total number of steps:

    python applications/phases.py --train-epochs 2 --distil-epochs 4 --finetune-epochs 2 --hardest 0.25

If the run is killed, the same command resumes with the phase that it was in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import distill_lm
import torch
from parts import cells, models, options, report, setup
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and those of the phases."""

    train_epochs: Annotated[int, options.COUNT, Doc("epochs of the first phase, without a teacher")] = 2
    distil_epochs: Annotated[int, options.COUNT, Doc("epochs of the second phase, with the teacher")] = 4
    finetune_epochs: Annotated[int, options.COUNT, Doc("epochs of the last phase, over the hardest blocks")] = 2
    finetune_lr: Annotated[float, Doc("learning rate of the last phase")] = 2e-4
    hardest: Annotated[float, Doc("share of the blocks in the last phase")] = 0.25


DEFAULTS = Settings(output=Path("runs/phases"), samples=6000)


@torch.no_grad()
def hardest(model: PreTrainedModel, blocks: Tensor, share: float) -> Tensor:
    """The blocks that the model predicts worst."""
    model.eval()
    losses = [
        kdloss.cross_entropy(model(input_ids=part).logits[:, :-1], part[:, 1:]).mean(1) for part in blocks.split(16)
    ]
    return blocks[torch.cat(losses).topk(max(1, round(share * len(blocks)))).indices]


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Run the phases, then each method alone for as many steps as all phases together."""
    args = options.read(DEFAULTS, arguments, __doc__)
    if not 0 < args.hardest <= 1:
        raise ValueError(f"--hardest must be above 0 and at most 1, got {args.hardest}")
    first = setup.prepare(args, distill_lm.train)
    best = distill_lm.teacher_measured(args, first)
    runs = {"teacher": [report.beside(best, best)]}

    def phase(name: str, data: setup.Setup, **settings: Any) -> dict[str, Any]:
        chosen = options.some(distill_lm.Settings, args, **settings)
        found = distill_lm.measured(chosen, data, name=name, students=args.output / "students")
        before = list(runs.values())[-1][0] if "student" in settings else None
        gain = {} if before is None else {"gained": before["perplexity"] - found["perplexity"]}
        runs[name] = [report.beside(found, best) | gain]
        return found

    trained = phase("1 trained", first, method="none", epochs=args.train_epochs)
    distilled = phase("2 distilled", first, student=trained["student"], epochs=args.distil_epochs)
    student = models.load(distilled["student"])[0].to(args.device)
    worst = hardest(student, first.blocks, args.hardest)
    hard = replace(first, blocks=worst, key=cells.key({"text": first.key, "blocks": worst.tolist()}))
    tuned = phase(
        "3 fine-tuned",
        hard,
        method="none",
        student=distilled["student"],
        epochs=args.finetune_epochs,
        lr=args.finetune_lr,
    )
    steps = sum(found["steps"] for found in (trained, distilled, tuned))
    phase("none, all steps", first, method="none", steps=steps)
    phase(f"{args.method}, all steps", first, steps=steps)
    print(report.write(runs, vars(args), args.output, distill_lm.NOTES))
    return runs


if __name__ == "__main__":
    main()
