"""Compare teachers that change during training with a fixed teacher and with none, on scikit-learn's digits.

By default, small perceptrons train on 300 digits, with ten seeds each; this takes a few minutes on two cores:

    python applications/changing_teachers.py --seeds 0 1 2 --steps 300

All students of a seed start from the same weights and take the same number of steps on the same images in the same
order. If the run is killed, the same command resumes with the seed that it was in.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure
from parts import cells, files, options, report
from rich import box
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings:
    """The models, their training and their teachers."""

    images: Annotated[int, options.COUNT, Doc("training images; all others are the test set")] = 300
    width: Annotated[int, options.COUNT, Doc("hidden units of a student's two layers")] = 16
    assistant_width: Annotated[int, options.COUNT, Doc("hidden units of the assistant's two layers")] = 32
    teacher_width: Annotated[int, options.COUNT, Doc("hidden units of the large teacher's two layers")] = 256
    steps: Annotated[int, options.COUNT, Doc("steps of every training")] = 1000
    batch_size: Annotated[int, options.COUNT, Doc("images per step")] = 64
    lr: Annotated[float, Doc("learning rate")] = 1e-2
    temperature: Annotated[float, Doc("T of the large teacher, the assistant and the ensemble")] = 3.0
    smoothing: Annotated[float, Doc("label smoothing, in the row with smoothed labels")] = 0.1
    decay: Annotated[float, Doc("decay of the moving average")] = 0.99
    generations: Annotated[int, options.COUNT, Doc("number of born-again generations")] = 3
    students: Annotated[int, options.COUNT, Doc("students of the ensemble, which learn from their average")] = 3
    seeds: Annotated[list[int], Doc("for images, weights and batches")] = field(default_factory=lambda: [*range(10)])
    output: Annotated[Path, Doc("folder of results")] = Path("runs/changing_teachers")


Found = dict[str, tuple[float, int]]  # misclassified test images in percent; number of trainings that the row needs


class Digits:
    """The images and models of one seed."""

    def __init__(self, args: Settings, seed: int) -> None:
        self.args, self.seed = args, seed
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
        x, y = torch.tensor(digits.data / 16).float()[order], torch.tensor(digits.target)[order]
        self.x, self.test_x = x.tensor_split([args.images])
        self.y, self.test_y = y.tensor_split([args.images])

    def model(self, width: int | None = None, start: int = 0) -> nn.Sequential:
        """A new perceptron, by default of the student's width."""
        torch.manual_seed(1000 * start + self.seed)
        n = width or self.args.width
        return nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, the same for every training."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.args.steps):
            some = torch.randint(len(self.x), [self.args.batch_size], generator=generator)
            yield self.x[some], self.y[some]

    def fit(self, learning: nn.Module, loss: Callable[..., Tensor], after: Callable[[], None] = lambda: None) -> None:
        """Minimise a loss of images and labels; call `after` after every step."""
        optimizer = torch.optim.AdamW(learning.parameters(), self.args.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.steps)
        for x, y in self.batches():
            loss(x, y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            after()

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Misclassified test images in percent."""
        return 100 * (model(self.test_x).argmax(-1) != self.test_y).float().mean().item()


def by_labels(digits: Digits, student: nn.Module, smoothing: float = 0.0) -> float:
    """Train a student without a teacher, and measure it."""
    digits.fit(student, lambda x, y: nn.functional.cross_entropy(student(x), y, label_smoothing=smoothing))
    return digits.error(student)


def by_teacher(digits: Digits, temperature: float, alpha: float) -> Callable[[nn.Module, nn.Module], float]:
    """Return a function that trains a student with a teacher, and measures it."""

    def train(student: nn.Module, teacher: nn.Module) -> float:
        model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(temperature, alpha)).train()
        digits.fit(model, lambda x, y: model(x, labels=y).loss)
        return digits.error(student)

    return train


def by_nobody(digits: Digits) -> Found:
    """The baselines: labels, and smoothed labels."""
    smoothed = by_labels(digits, digits.model(), digits.args.smoothing)
    return {"alone": (by_labels(digits, digits.model()), 1), "alone, labels smoothed": (smoothed, 1)}


def by_large_teacher(digits: Digits) -> Found:
    """A fixed teacher, directly and through an assistant."""
    teacher, assistant = digits.model(digits.args.teacher_width), digits.model(digits.args.assistant_width)
    train = by_teacher(digits, digits.args.temperature, alpha=0.5)
    found = {"large teacher": (by_labels(digits, teacher), 1)}
    found["by the large teacher"] = train(digits.model(), teacher), 2
    errors = kdloss.chain([teacher, assistant, digits.model()], train)
    return found | {"its assistant": (errors[0], 2), "by the assistant": (errors[1], 3)}


def by_generations(digits: Digits) -> Found:
    """Born-again networks: each generation starts anew and learns the predictions of the one before."""
    models = [digits.model(start=k) for k in range(digits.args.generations + 1)]
    by_labels(digits, models[0])
    errors = kdloss.chain(models, by_teacher(digits, 1.0, alpha=0.0))
    return {f"generation {k}": (error, k + 1) for k, error in enumerate(errors, start=1)}


def by_average(digits: Digits) -> Found:
    """A student that learns from the moving average of its own weights."""
    student = digits.model()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(digits.args.decay))
    model = kdloss.Distillation(student, average, kdloss.VanillaKD(1.0, alpha=0.5)).train()
    digits.fit(model, lambda x, y: model(x, labels=y).loss, lambda: average.update_parameters(student))
    return {"by its moving average": (digits.error(student), 1), "the moving average": (digits.error(average), 1)}


def by_each_other(digits: Digits) -> Found:
    """Two students with different initial weights that teach each other (deep mutual learning, DML)."""
    students = nn.ModuleList([digits.model(), digits.model(start=1)])
    criterion = kdloss.CrossEntropy() + kdloss.Logits()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        one, other = (model(x) for model in students)
        return criterion(one, other, y) + criterion(other, one, y)

    digits.fit(students, loss)
    return {"by each other": (digits.error(students[0]), 2)}


def by_ensemble(digits: Digits) -> Found:
    """Several students that learn from the average of their predictions."""
    students = nn.ModuleList([digits.model(start=k) for k in range(digits.args.students)])
    criterion = kdloss.CrossEntropy() + kdloss.Logits(temperature=digits.args.temperature)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = [model(x) for model in students]
        return sum(criterion(own, kdloss.Mixture(logits), y) for own in logits)

    digits.fit(students, loss)
    return {f"by the average of {len(students)}": (digits.error(students[0]), len(students))}


def table(found: Mapping[str, Sequence[tuple[float, int]]]) -> str:
    """A Markdown table; differences are between runs of the same seed."""
    alone = [error for error, _ in found["alone"]]
    lines = [["", "misread, %", "against alone", "trainings"]]
    for row, seeds in found.items():
        gained = [error - without for (error, _), without in zip(seeds, alone, strict=True)]
        beside = report.spread(gained, "{:+.1f}") if row != "alone" else "-"
        lines.append([row, report.spread([error for error, _ in seeds], "{:.1f}"), beside, str(seeds[0][1])])
    return report.aligned(lines, box.MARKDOWN)


def picture(found: Mapping[str, Sequence[tuple[float, int]]]) -> Figure:
    """Bars for the means, dots for the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    errors = {row: [error for error, _ in seeds] for row, seeds in found.items()}
    axes.barh(list(errors), [statistics.mean(x) for x in errors.values()], color="C0", alpha=0.5)
    for row, seeds in errors.items():
        axes.plot(seeds, [row] * len(seeds), "k.", markersize=4)
    axes.axvline(statistics.mean(errors["alone"]), color="black", linewidth=1, linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="misclassified test images, % (less is better); dots: seeds; dotted line: a student alone")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[tuple[float, int]]]:
    """Train every kind of student for every seed, and write the results."""
    args = options.read(Settings(), arguments, __doc__)
    kinds = [by_nobody, by_large_teacher, by_generations, by_average, by_each_other, by_ensemble]
    found: dict[str, list[tuple[float, int]]] = {}
    settings = {name: x for name, x in vars(args).items() if name not in ("seeds", "output")}
    for seed, kind in tqdm([(seed, kind) for seed in args.seeds for kind in kinds], "students", leave=False):
        work = lambda _, seed=seed, kind=kind: kind(Digits(args, seed))  # noqa: E731
        rows = cells.cell(args.output / "seeds", kind.__name__, settings | {"seed": seed}, work)
        for row, (error, trainings) in rows.items():
            found.setdefault(row, []).append((error, trainings))
    files.save_json({"settings": vars(args), "found": found}, args.output / "results.json")
    print(report.put(table(found), picture(found), args.output))
    return found


if __name__ == "__main__":
    main()
