"""Distil from a teacher with another tokenizer: both models read the same text, each in its own tokens.

    python applications/cross_tokenizer.py --seeds 0 1 2
    python applications/cross_tokenizer.py --teacher my/teacher --student-tokenizer my/other --data texts.jsonl

Where a token of the student and a token of the teacher end at the same character, both models have read the same
text. There, their predictions of the next token are compared in one of three ways:

- "shared": over the tokens in both vocabularies; both sides leave out the probability of all other tokens.
- "begun": over the student's vocabulary; a teacher's token counts as the first of the student's tokens that spell it.
- "uld": as sorted probabilities, whatever the tokens are.

Everywhere else the student learns from its labels alone. The baselines are the same student without a teacher, for as
many steps and for as many floating-point operations. If the run is killed, the same command resumes it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import distill_lm
import torch
from parts import alignment, cells, evaluation, models, options, report, text
from parts.setup import Setup, prepare
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Doc

import kdloss

NOTES = f"""\
{distill_lm.NOTES}
Student and teacher have different tokens, so the teacher's perplexity is left out. Compare bits per character."""
SAME_COMPUTE = "none-same-compute"


@dataclass(kw_only=True)
class Settings(options.Evaluation, options.Training, options.Student, options.Teacher, options.Text):
    """Most settings of distill_lm.py, and the student's tokenizer."""

    student_tokenizer: Annotated[
        str | None, Doc("folder or hub name; otherwise that of --student, or one trained on Python's documentation")
    ] = None
    student_vocabulary: Annotated[int, options.COUNT, Doc("vocabulary size of a trained tokenizer")] = 1024
    alpha: Annotated[float, Doc("weight of cross-entropy beside the KL; uld has 1 and 1.5 as in its paper")] = 0.1
    seeds: Annotated[list[int], Doc("seeds to repeat everything with")]


DEFAULTS = Settings(output=Path("runs/cross_tokenizer"), samples=6000, seeds=[0])


class AlignedLoss:
    """Replaces the `kdloss.Distiller` in the loop of distill_lm.py; every token counts once.

    Tokens in the mask go to the criterion, with the teacher. All other tokens go to cross-entropy with their labels.
    """

    def __init__(self, teacher: alignment.TeacherAtStudentTokens, criterion: kdloss.Sum) -> None:
        self.criterion, self.teachers = criterion, [kdloss.Teacher(teacher)]
        self.by_labels = kdloss.Sum(kdloss.CrossEntropy(), causal=True)
        self.asks = criterion.plan(1).last_teacher >= 0

    def prepare(self, student: PreTrainedModel) -> None:
        """Do nothing: only the student is trained."""

    def __call__(
        self,
        student: PreTrainedModel,
        input_ids: Tensor,
        labels: Tensor,
        teacher_ids: Tensor,
        teacher_at: Tensor,
        mask: Tensor,
    ) -> kdloss.Distilled:
        """Compute the loss of one step."""
        out, told = student(input_ids=input_ids), None
        if self.asks:
            with torch.no_grad():
                told = self.teachers[0].module(teacher_ids, teacher_at)
        of_all = {"num_items_in_batch": labels[:, 1:].numel()}
        loss = self.criterion(out.logits, told, labels, mask=mask, **of_all)
        rest = self.by_labels(out.logits, None, labels, mask=~mask, **of_all)
        return kdloss.Distilled.of(loss + rest, out, self.criterion.components)


def criteria(args: Settings, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The loss of each row, for the tokens at which student and teacher are aligned."""
    shared, all_begun = kdloss.TokenMap.of(student, teacher), alignment.begun(student, teacher)
    kl = {"shared": kdloss.Logits(vocabulary=shared), "begun": kdloss.Logits(vocabulary=all_begun)}
    weighted = {row: args.alpha * kdloss.CrossEntropy() + (1 - args.alpha) * term for row, term in kl.items()}
    uld = 1.0 * kdloss.CrossEntropy() + 1.5 * kdloss.Logits(kdloss.divergences.uld)
    rows = {"none": kdloss.CrossEntropy(), **weighted, "uld": uld}
    return {row: kdloss.Sum(loss, causal=True) for row, loss in rows.items()}


def tokenizer_of(args: Settings) -> PreTrainedTokenizerBase:
    """The student's tokenizer."""
    if args.student_tokenizer:
        return AutoTokenizer.from_pretrained(args.student_tokenizer)
    if args.student:
        return models.load(args.student)[1]
    return text.train_tokenizer([*topics.values()], args.student_vocabulary)


def student_of(args: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A student before training; the same seed gives the same student."""
    torch.manual_seed(args.seed)
    if args.student:
        student = models.load(args.student)[0]
    else:
        shape = (args.student_layers, args.student_width, args.student_heads)
        student = models.gpt2(*shape, dropout=args.dropout, tokenizer=tokenizer, length=args.max_length)
    models.check_length(student, args.max_length, "student")
    student.get_input_embeddings().requires_grad_(not args.freeze_embeddings)
    return student.to(args.device)


def of_student(args: Settings, teachers: Setup) -> tuple[Setup, dict[str, Tensor]]:
    """The teacher's texts in the student's tokens, to train and to measure on; and blocks with the tokens of both."""
    tokenizer, words = tokenizer_of(args), teachers.texts[: teachers.texts_of_student]
    context = getattr(teachers.teacher.config, "max_position_embeddings", math.inf)
    both = (alignment.read(one, words) for one in (tokenizer, teachers.tokenizer))
    blocks = alignment.aligned(*both, args.max_length, context)
    token_ids = text.tokenize(tokenizer, teachers.unseen)
    prompts, reference = evaluation.continuations(token_ids, args.continuations, args.max_length)
    heldout = text.pack(token_ids, args.max_length)
    key = cells.key({"text": teachers.key, "words": tokenizer.get_vocab()})
    own = {"tokenizer": tokenizer, "blocks": blocks["input_ids"], "heldout": heldout, "key": key, "judge": None}
    return replace(teachers, prompts=prompts, reference=reference, **own), blocks


def batches(blocks: dict[str, Tensor], args: Settings, steps: int) -> Iterator[dict[str, Tensor]]:
    """The batches of distill_lm.py, with the teacher's tokens."""
    drawn = text.draw(torch.arange(len(blocks["mask"])), args.student_blocks, args.seed)
    for batch in text.batches(drawn, args.batch_size, steps, args.seed):
        batch = {name: x[batch["input_ids"]].to(args.device) for name, x in blocks.items()}
        yield batch | {"labels": batch["input_ids"]}


def bits(found: dict[str, Any], setup: Setup) -> dict[str, float]:
    """Bits per character of the held-out texts, with their end-of-text tokens, from the perplexity per token."""
    tokens = sum(map(len, text.tokenize(setup.tokenizer, setup.unseen)))
    per_token = math.log2(found["perplexity"])
    return {"bits_per_character": per_token * tokens / sum(len(words) + 1 for words in setup.unseen)}


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Train without the teacher and in each of the three ways, and write the results."""
    args = options.read(DEFAULTS, arguments, __doc__)
    if args.keep_blocks is not None:
        raise ValueError("a student made of the teacher's blocks has the teacher's tokenizer: leave out --keep-blocks")
    teachers = prepare(args, distill_lm.train)
    best = distill_lm.teacher_measured(args, teachers)
    setup, blocks = of_student(args, teachers)
    teacher = alignment.TeacherAtStudentTokens(teachers.teacher)
    losses = criteria(args, setup.tokenizer, teachers.tokenizer)
    elsewhere = {*distill_lm.ELSEWHERE, "seeds"}
    runs: dict[str, list[dict[str, Any]]] = {"teacher": [report.beside(best | bits(best, teachers), best)]}

    def measured(row: str, loss: Any, args: Settings) -> dict[str, Any]:
        settings = {name: x for name, x in vars(args).items() if name not in elsewhere} | {"text": setup.key}
        kept = args.output / "students" / f"{row}-{args.seed}"

        def work(folder: Path) -> dict[str, Any]:
            loop, student = AlignedLoss(teacher, loss), student_of(args, setup.tokenizer)
            order = partial(batches, blocks, args)
            return distill_lm.fit(loop, student, args, setup, folder, kept, f"{row} ({args.seed})", order)

        found = cells.cell(args.output / "cells", row, settings, work, kept)
        return found | bits(found, setup)

    for seed in args.seeds:
        seeded = replace(args, seed=seed)
        found = {row: measured(row, loss, seeded) for row, loss in losses.items()}
        alone, dearest = found["none"], max(x["teraflop"] for x in found.values())
        longer = replace(seeded, steps=round(alone["steps"] * dearest / alone["teraflop"]))
        found[SAME_COMPUTE] = measured(SAME_COMPUTE, losses["none"], longer)
        for row, x in found.items():
            runs.setdefault(row, []).append(report.beside(x, best, None if row == "none" else alone))
    for x in (x for found in runs.values() for x in found):
        x.pop("retention")  # a ratio of perplexities over different tokens
        x.pop("samples", None)
    del runs["teacher"][0]["perplexity"]
    together = blocks["mask"][:, 1:].float().mean()
    both = len(kdloss.TokenMap.of(setup.tokenizer, teachers.tokenizer).student_ids)
    said = f"{together:.0%} of the student's tokens are aligned with the teacher's; {both} are in both vocabularies."
    print(report.write(runs, vars(args), args.output, f"{NOTES}\n{said}"))
    return runs


if __name__ == "__main__":
    main()
