"""Distil for one task, summarisation: the student learns from its teacher's late layers.

By default, it learns to write the short description of a Wikipedia article:

    python applications/summarise.py
    python applications/summarise.py --data articles.jsonl --document article --summary highlights

A document, an arrow and its summary form one sequence for a causal language model. The student is made of the teacher's
own blocks. All losses count the tokens of the summary only; all other labels are -100. If the run is killed, the same
command resumes it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import distill_lm
import torch
from parts import cells, evaluation, models, operations, options, report, setup, text
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Doc

import kdloss

ARROW = " =>"  # no space after it: tokens begin with a space
NOTES = """\
ROUGE-1/2/L (F1, percent) of greedy summaries of documents that no model has seen, and perplexity of the real ones.
Retention: the teacher's perplexity divided by the student's. TFLOP: floating-point operations of training in 10^12,
with the teacher's forward passes; products and attention are counted on about eight batches and scaled up, because
batches differ in length. Seconds: time of training; CPU time with one thread, otherwise wall time."""
Pair = tuple[list[int], list[int]]  # tokens of a document, and of the arrow and its summary


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and those of the task."""

    document: Annotated[str, Doc("column of the long text")] = "extract"
    summary: Annotated[str, Doc("column of the short text")] = "description"
    summary_length: Annotated[int, options.COUNT, Doc("longest summary in tokens, with the arrow")] = 24


DEFAULTS = Settings(
    output=Path("runs/summarise"), method="both", alpha=0.2, layers="late", samples=5000, epochs=3,
    max_length=128, teacher_layers=6, teacher_epochs=3, keep_blocks=[0, 2, 3, 5],
    student_samples=1000, batch_size=16,
)  # fmt: skip


def read_pairs(args: Settings) -> list[tuple[str, str]]:
    """All pairs of a document and its summary, without empty ones."""
    if args.data is None:
        entries = text.packaged_summaries()
    else:
        data = text.load(args.data, args.data_config, args.split)
        for column in (args.document, args.summary):
            text.text_column(data, column)
        entries = list(data)
    pairs = [(entry[args.document], entry[args.summary]) for entry in entries]
    pairs = [(document, summary) for document, summary in pairs if document and summary]
    if len(pairs) <= args.heldout_samples:
        raise ValueError(
            f"{len(pairs)} of {len(entries)} entries have both {args.document!r} and {args.summary!r}, no more than "
            f"the {args.heldout_samples} held out: change --document, --summary or --heldout-samples"
        )
    return pairs[: args.samples]


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], length: int, summary: int
) -> list[Pair]:
    """Token ids of documents and summaries; long documents are cut so that the summary fits."""
    found = []
    for document, short in pairs:
        ids = tokenizer(f"{ARROW} {short}", add_special_tokens=False)["input_ids"][: summary - 1]
        long = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        found.append((long[: length - summary], [*ids, tokenizer.eos_token_id]))
    return found


def batch_of(pairs: Sequence[Pair], pad: int) -> dict[str, Tensor]:
    """A padded batch; only the summaries have labels."""
    longest = max(len(document) + len(summary) for document, summary in pairs)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for document, summary in pairs:
        length = len(document) + len(summary)
        rest = longest - length
        batch["input_ids"].append(document + summary + [pad] * rest)
        batch["attention_mask"].append([1] * length + [0] * rest)
        batch["labels"].append([-100] * len(document) + summary + [-100] * rest)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def batches(pairs: Sequence[Pair], pad: int, steps: int, args: Settings) -> Iterator[dict[str, Tensor]]:
    """Batches for this many steps, shuffled by the seed; an epoch has every pair once."""
    for chosen in text.batches(torch.arange(len(pairs)), args.batch_size, steps, args.seed):
        batch = batch_of([pairs[i] for i in chosen["input_ids"]], pad)
        yield {name: x.to(args.device) for name, x in batch.items()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, pairs: Sequence[Pair], pad: int) -> float:
    """The exponential of the mean cross-entropy over all tokens of the real summaries."""
    was_training = model.training
    model.eval()
    total = count = 0.0
    for start in range(0, len(pairs), 32):
        batch = {k: x.to(model.device) for k, x in batch_of(pairs[start : start + 32], pad).items()}
        labels = batch.pop("labels")[:, 1:]
        values = kdloss.cross_entropy(model(**batch).logits[:, :-1], labels)
        total += values.sum().item()
        count += (labels != -100).sum().item()
    model.train(was_training)
    return math.exp(min(total / count, 700))


@torch.no_grad()
def summaries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], length: int
) -> list[str]:
    """Generate greedy summaries of the documents."""
    model.eval()
    arrow, pad = tokenizer(ARROW, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id
    settings = {"do_sample": False, "max_new_tokens": length - len(arrow), "pad_token_id": pad}
    written = []
    for start in tqdm(range(0, len(pairs), 32), "summaries", leave=False):
        prompts = [document + arrow for document, _ in pairs[start : start + 32]]
        longest = max(map(len, prompts))
        left = [longest - len(prompt) for prompt in prompts]  # pad on the left: generation continues on the right
        ids = torch.tensor([[pad] * n + p for n, p in zip(left, prompts, strict=True)], device=model.device)
        mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(left, prompts, strict=True)])
        out = model.generate(ids, attention_mask=mask.to(ids.device), **settings)
        written += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [summary.strip() for summary in written]


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], length: int
) -> dict[str, Any]:
    """The quality of a model's summaries, compared with the real ones."""
    written = summaries(model, tokenizer, pairs, length)
    real = [tokenizer.decode(ids, skip_special_tokens=True).removeprefix(f"{ARROW} ") for _, ids in pairs]
    return {
        "perplexity": perplexity(model, pairs, tokenizer.pad_token_id),
        **evaluation.rouge(written, real),
        "parameters": model.num_parameters(),
        "examples": [{"real": r, "written": w} for r, w in zip(real[:5], written[:5], strict=True)],
    }


def main(arguments: Sequence[str] | None = None) -> report.Runs:
    """Get a teacher that summarises, distil a student, and compare with a student trained alone."""
    args = options.read(DEFAULTS, arguments, __doc__)
    texts = read_pairs(args)
    seen, heldout = texts[: -args.heldout_samples], texts[-args.heldout_samples :]
    joined = [f"{document}{ARROW} {summary}" for document, summary in seen]
    teacher, tokenizer = setup.teacher_of(args, joined, distill_lm.train)
    teacher.to(args.device).eval()
    models.check_length(teacher, args.max_length, "teacher")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = partial(encode, tokenizer, length=args.max_length, summary=args.summary_length)
    unseen, pairs = encoded(heldout), encoded(seen[: args.student_samples])
    key = {"teacher": teacher.name_or_path, "pairs": pairs, "heldout": unseen}
    steps = args.steps or args.epochs * -(-len(pairs) // args.batch_size)

    def student(method: str, folder: Path) -> dict[str, Any]:
        model = setup.student_of(args, teacher, tokenizer)
        criterion = distill_lm.criterion_for(replace(args, method=method))
        distill = kdloss.Distiller(teacher, criterion).prepare(model)
        curve = distill_lm.train(
            distill,
            model,
            AdamW([*model.parameters(), *criterion.parameters()], lr=args.lr),
            batches(pairs, tokenizer.pad_token_id, steps, args),
            steps,
            partial(perplexity, pairs=unseen, pad=tokenizer.pad_token_id),
            folder,
            save_every=args.save_every,
            points=args.points,
            title=method,
        )
        models.save(model, tokenizer, args.output / "students" / method)
        some = [*batches(pairs, tokenizer.pad_token_id, steps, args)][:: -(-steps // 8)]
        teraflop = operations.of_training(lambda batch: distill(model, **batch).loss.backward(), some)
        found = evaluate(model, tokenizer, unseen, args.summary_length)
        return found | {
            "seed": args.seed,
            "steps": steps,
            "teraflop": teraflop * steps / len(some),
            "seconds": curve[-1]["seconds"],
            "curve": curve,
        }

    def measured(name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        settings = {n: value for n, value in vars(args).items() if n not in distill_lm.ELSEWHERE}
        return cells.cell(args.output / "cells", name, settings | key, work)

    best = measured("teacher", lambda _: evaluate(teacher, tokenizer, unseen, args.summary_length))
    runs = {"teacher": [report.beside(best, best)]}
    for method in dict.fromkeys(("none", args.method)):
        found = measured(method, partial(student, method))
        alone = runs["none"][0] if "none" in runs else None
        runs[method] = [report.beside(found, best, alone)]
    print(report.write(runs, vars(args), args.output, NOTES))
    return runs


if __name__ == "__main__":
    main()
