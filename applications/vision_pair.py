"""A deep residual net and a shallow one, as in benchmarks of images: eight ways to distil, by their published weights.

    python applications/vision_pair.py --seeds 0 1 2

wants MNIST (`make mnist` installs it, or --mnist), pooled to 14 x 14. The teacher has 32 layers and sees 10 000 images,
students have 8 and see 500 of them. Weights, optimizer and learning rate are those that docs/recipes_images.md names,
for CIFAR-100 and 240 epochs of 50 000 images; nothing was chosen here. Killed at any instant, the same command goes on
with what is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
from matplotlib.figure import Figure
from parts import cells, files, images, options, report
from rich import box
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm, trange
from typing_extensions import Doc

import kdloss
from kdloss import CrossEntropy, Features, Logits, distances, divergences, schedules


@dataclass(kw_only=True)
class Settings:
    """What is trained, for how long, and by what."""

    mnist: Annotated[Path | None, Doc("mnist.pkl.gz; else the one of the package")] = None
    teacher_images: Annotated[int, options.COUNT, Doc("images that the teacher learns from")] = 10_000
    images: Annotated[int, options.COUNT, Doc("those that students do")] = 500
    width: Annotated[int, options.COUNT, Doc("channels of the first stage; twice, four times as many follow")] = 8
    teacher_steps: Annotated[int, options.COUNT, Doc("steps of the teacher")] = 1000
    steps: Annotated[int, options.COUNT, Doc("steps of a student")] = 600
    batch_size: Annotated[int, options.COUNT, Doc("images in a step")] = 64
    lr: Annotated[float, Doc("SGD's learning rate, a tenth of it three times towards the end")] = 0.05
    jitter: Annotated[int, Doc("pixels that images are moved by at most")] = 1
    seeds: Annotated[list[int], Doc("of images, weights and batches")] = field(default_factory=lambda: [*range(3)])
    output: Annotated[Path, Doc("folder of results")] = Path("runs/vision_pair")


STAGES = ["layer1", "layer2", "layer3"]


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.body = nn.Sequential(
            conv(before, width, stride=stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width),
            nn.BatchNorm2d(width),
        )
        same = before == width and stride == 1
        other = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if same else other

    def forward(self, x: Tensor) -> Tensor:
        """The map [B, width, height / stride, ...]."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: int, width: int) -> nn.Sequential:
    """The one for CIFAR: a convolution, three stages of so many blocks, a classifier: 6 * blocks + 2 layers."""
    net, before = nn.Sequential(), width
    net.conv1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    for k, name in enumerate(STAGES):
        stage = nn.Sequential()
        for i in range(blocks):
            stage.append(Block(before, width * 2**k, stride=2 if k and not i else 1))
            before = width * 2**k
        net.add_module(name, stage)
    net.avgpool, net.flatten, net.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)
    return net


def regressor(student: int, teacher: int) -> nn.Module:
    """VID's three convolutions."""
    first, *more = (nn.Conv2d(width, teacher, 1, bias=False) for width in (student, teacher, teacher))
    return nn.Sequential(first, nn.ReLU(), more[0], nn.ReLU(), more[1])


def criteria(steps: int) -> dict[str, kdloss.Sum]:
    """Row: the loss of docs/recipes_images.md; DKD's first 20 of 240 epochs are a twelfth of the steps."""
    same = partial(Features, pairing="same")
    examples, dkd = distances.examples, partial(divergences.dkd, alpha=1.0, beta=8.0)
    lengths = same(["avgpool"], distance=examples.rkd_distance, name="distance")
    angles = same(["avgpool"], distance=examples.rkd_angle, name="angle")
    vid = same(STAGES, projection=regressor, distance=distances.VID)
    return {
        "none": kdloss.VanillaKD(alpha=1.0),
        "KD": kdloss.VanillaKD(temperature=4.0, alpha=0.1),
        "DKD": CrossEntropy() + schedules.warmup(steps // 12, 1.0) * Logits(dkd, temperature=4.0),
        "DIST": CrossEntropy() + 2.0 * Logits(divergences.dist, temperature=1.0),
        "AT": CrossEntropy() + 3 * 1000.0 * same(STAGES, distance=distances.attention_transfer),
        "VID": CrossEntropy() + 3 * 1.0 * vid,
        "SP": CrossEntropy() + 3000.0 * same(["layer3"], distance=examples.similarity),
        "RKD": CrossEntropy() + 25.0 * lengths + 50.0 * angles,
        "CRD": CrossEntropy() + 0.8 * same(["avgpool"], distance=distances.CRD, name="crd"),
    }


class Study:
    """The images and models of one seed."""

    def __init__(self, args: Settings, seed: int) -> None:
        self.args, self.seed = args, seed
        learn, _, self.test = (images.Images(F.avg_pool2d(x, 2), y) for x, y in images.mnist(args.mnist))
        some = torch.randperm(len(learn.y), generator=torch.Generator().manual_seed(seed))[: args.teacher_images]
        self.learn = images.Images(learn.x[some], learn.y[some])

    def fit(self, model: kdloss.Distillation, count: int, steps: int) -> float:
        """Train on the first so many images; returns how many test images the student misreads, in percent."""
        model.prepare(self.learn.x[:2, None]).train()
        torch.manual_seed(self.seed)  # the same batches, whatever was drawn before
        optimizer = torch.optim.SGD(model.parameters(), self.args.lr, momentum=0.9, weight_decay=5e-4)
        falls = [steps * part // 24 for part in (15, 18, 21)]  # of 240 epochs: 150, 180, 210
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
        for _ in trange(steps, desc="steps", leave=False):
            some = torch.randint(count, [self.args.batch_size])
            x = images.shifted(self.learn.x[some], self.args.jitter)[:, None]
            model(x, labels=self.learn.y[some]).loss.backward()
            optimizer.step()
            model.criterion.advance()
            schedule.step()
            optimizer.zero_grad()
        return self.error(model.student.eval())

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """How many test images are misread, in percent."""
        read = torch.cat([model(x[:, None]).argmax(-1) for x in self.test.x.split(1000)])
        return 100 * (read != self.test.y).float().mean().item()

    def net(self, blocks: int) -> nn.Sequential:
        """A new one."""
        torch.manual_seed(self.seed)
        return resnet(blocks, self.args.width)

    def teach(self, kept: Path) -> dict[str, float]:
        """The teacher, trained by labels and kept."""
        net = self.net(5)
        model = kdloss.Distillation(net, None, kdloss.VanillaKD(alpha=1.0))
        error = self.fit(model, self.args.teacher_images, self.args.teacher_steps)
        with files.replacing(kept) as partly:
            torch.save(net.state_dict(), partly)
        return {"error": error}

    def student(self, row: str, kept: Path) -> dict[str, float]:
        """A student, by this row's loss."""
        teacher = self.net(5).eval()
        teacher.load_state_dict(torch.load(kept, weights_only=True))
        model = kdloss.Distillation(self.net(1), teacher, criteria(self.args.steps)[row])
        return {"error": self.fit(model, self.args.images, self.args.steps)}


def table(found: dict[str, list[float]]) -> str:
    """One line per row, as Markdown; differences are seed by seed."""
    lines = [["", "misread, %", "against none"]]
    for row, errors in found.items():
        gained = [error - without for error, without in zip(errors, found["none"], strict=True)]
        beside = report.spread(gained, "{:+.2f}") if row not in ("teacher", "none") else "-"
        lines.append([row, report.spread(errors, "{:.2f}"), beside])
    return report.aligned(lines, box.MARKDOWN)


def picture(found: dict[str, list[float]]) -> Figure:
    """Every seed a dot, the mean a bar with its standard deviation; the teacher is a line."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in found if row != "teacher"]
    deviations = [stdev(found[row]) if len(found[row]) > 1 else 0.0 for row in rows]
    axes.barh(rows, [mean(found[row]) for row in rows], xerr=deviations, color="C0", alpha=0.5)
    for row in rows:
        axes.plot(found[row], [row] * len(found[row]), "k.", markersize=4)
    for row, style in {"teacher": "--", "none": ":"}.items():
        axes.axvline(mean(found[row]), color="black", linewidth=1, linestyle=style, label=row)
    figure.legend(loc="outside upper right", ncols=2)
    axes.invert_yaxis()
    axes.set(xlabel="test images misread, % (less is better); dots are seeds, whiskers their standard deviation")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train every kind of student for every seed, and write what came of it."""
    args = options.read(Settings(), arguments, __doc__)
    found: dict[str, list[float]] = {}
    settings = {name: x for name, x in vars(args).items() if name not in ("seeds", "output", "mnist")}
    rows = ["teacher", *criteria(args.steps)]
    for seed, row in tqdm([(seed, row) for seed in args.seeds for row in rows], "nets", leave=False):
        kept = args.output / "teachers" / f"{cells.key(settings | {'seed': seed})}.pt"
        alone = row == "teacher"
        work = lambda _, seed=seed, row=row, kept=kept, alone=alone: (  # noqa: E731
            Study(args, seed).teach(kept) if alone else Study(args, seed).student(row, kept)
        )
        done = cells.cell(args.output / "cells", row, settings | {"seed": seed}, work, kept if alone else None)
        found.setdefault(row, []).append(done["error"])
    files.save_json({"settings": vars(args), "found": found}, args.output / "results.json")
    print(report.put(table(found), picture(found), args.output))
    return found


if __name__ == "__main__":
    main()
