"""Distil a deep residual net into a shallow one, as in image benchmarks: eight losses with their published weights.

    python applications/vision_pair.py --seeds 0 1 2

It needs MNIST (install it with `make mnist`, or pass --mnist), which it pools to 14 x 14. The teacher has 32 layers and
10 000 images, students have 8 layers and 500 of these images. Weights, optimizer and learning rate are those of
docs/recipes_images.md, which are for CIFAR-100 and 240 epochs of 50 000 images; nothing was tuned here. If the run is
killed, the same command resumes with what is missing.
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
    """The nets and their training."""

    mnist: Annotated[Path | None, Doc("mnist.pkl.gz; otherwise that of the installed package")] = None
    teacher_images: Annotated[int, options.COUNT, Doc("training images of the teacher")] = 10_000
    images: Annotated[int, options.COUNT, Doc("training images of the students")] = 500
    width: Annotated[int, options.COUNT, Doc("channels of the first stage; the next two have 2 and 4 times that")] = 8
    teacher_steps: Annotated[int, options.COUNT, Doc("steps of the teacher")] = 1000
    steps: Annotated[int, options.COUNT, Doc("steps of a student")] = 600
    batch_size: Annotated[int, options.COUNT, Doc("images per step")] = 64
    lr: Annotated[float, Doc("SGD's learning rate; divided by 10 three times towards the end")] = 0.05
    jitter: Annotated[int, Doc("largest shift of an image, in pixels")] = 1
    seeds: Annotated[list[int], Doc("for images, weights and batches")] = field(default_factory=lambda: [*range(3)])
    output: Annotated[Path, Doc("folder of results")] = Path("runs/vision_pair")


STAGES = ["layer1", "layer2", "layer3"]


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

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
        """Return a feature map [B, width, height / stride, width / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: int, width: int) -> nn.Sequential:
    """A ResNet for CIFAR with 6 * blocks + 2 layers: a convolution, three stages of `blocks` blocks, a classifier."""
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
    """The projection of VID: three convolutions."""
    first, *more = (nn.Conv2d(width, teacher, 1, bias=False) for width in (student, teacher, teacher))
    return nn.Sequential(first, nn.ReLU(), more[0], nn.ReLU(), more[1])


def criteria(steps: int) -> dict[str, kdloss.Sum]:
    """The loss of each row, as in docs/recipes_images.md. DKD's warmup, 20 of 240 epochs, is a twelfth of the steps."""
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
        """Train on the first `count` images; return the percentage of test images that the student misclassifies."""
        model.prepare(self.learn.x[:2, None]).train()
        torch.manual_seed(self.seed)  # every row sees the same batches
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
        """Misclassified test images in percent."""
        read = torch.cat([model(x[:, None]).argmax(-1) for x in self.test.x.split(1000)])
        return 100 * (read != self.test.y).float().mean().item()

    def net(self, blocks: int) -> nn.Sequential:
        """A new ResNet."""
        torch.manual_seed(self.seed)
        return resnet(blocks, self.args.width)

    def teach(self, kept: Path) -> dict[str, float]:
        """Train the teacher on labels, and save it."""
        net = self.net(5)
        model = kdloss.Distillation(net, None, kdloss.VanillaKD(alpha=1.0))
        error = self.fit(model, self.args.teacher_images, self.args.teacher_steps)
        with files.replacing(kept) as partly:
            torch.save(net.state_dict(), partly)
        return {"error": error}

    def student(self, row: str, kept: Path) -> dict[str, float]:
        """Train a student with the loss of this row."""
        teacher = self.net(5).eval()
        teacher.load_state_dict(torch.load(kept, weights_only=True))
        model = kdloss.Distillation(self.net(1), teacher, criteria(self.args.steps)[row])
        return {"error": self.fit(model, self.args.images, self.args.steps)}


def table(found: dict[str, list[float]]) -> str:
    """A Markdown table; differences are between runs of the same seed."""
    lines = [["", "misread, %", "against none"]]
    for row, errors in found.items():
        gained = [error - without for error, without in zip(errors, found["none"], strict=True)]
        beside = report.spread(gained, "{:+.2f}") if row not in ("teacher", "none") else "-"
        lines.append([row, report.spread(errors, "{:.2f}"), beside])
    return report.aligned(lines, box.MARKDOWN)


def picture(found: dict[str, list[float]]) -> Figure:
    """Bars for means with standard deviations, dots for seeds, a line for the teacher."""
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
    axes.set(xlabel="misclassified test images, % (less is better); dots: seeds; whiskers: standard deviation")
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train every kind of student for every seed, and write the results."""
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
