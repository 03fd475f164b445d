"""Reproduce section 3 of Hinton, Vinyals, Dean 2015 (arXiv:1503.02531): small MNIST nets learn from a large one.

    python applications/published_mnist.py --seeds 0 1 2 3 4

It needs all of MNIST: install it with `make mnist`, or pass --mnist. It takes about 80 minutes on one idle core; if the
run is killed, the same command resumes with what is missing. There is one large net, as in the paper; seeds are those
of the small nets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from parts import cells, files, images, options, report
from parts.checkpoint import Checkpoint
from rich import box
from torch import Tensor, nn
from tqdm import tqdm, trange
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings:
    """The nets and their training."""

    mnist: Annotated[Path | None, Doc("mnist.pkl.gz; otherwise that of the installed package")] = None
    teacher_width: Annotated[int, options.COUNT, Doc("units in each of the large net's two layers")] = 1200
    width: Annotated[int, options.COUNT, Doc("units in each of the small net's two layers")] = 800
    narrow: Annotated[list[int], Doc("units of the nets that are distilled at every temperature")] = field(
        default_factory=lambda: [30, 300]
    )
    temperature: Annotated[float, Doc("temperature for the small net")] = 20.0
    temperatures: Annotated[list[float], Doc("temperatures for the narrow nets")] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 8.0, 20.0]
    )
    alpha: Annotated[float, Doc("weight of the labels, if the transfer set has every digit")] = 0.1
    teacher_epochs: Annotated[int, options.COUNT, Doc("epochs of the large net")] = 60
    steps: Annotated[int, options.COUNT, Doc("steps of a small net, in whole epochs of the images that it sees")] = 4000
    batch_size: Annotated[int, options.COUNT, Doc("images per step")] = 250
    lr: Annotated[float, Doc("Adam's peak learning rate; the schedule is a cosine")] = 1e-3
    jitter: Annotated[int, Doc("largest shift of the large net's images, in pixels")] = 2
    max_norm: Annotated[float, Doc("largest norm of the weights into a unit of the large net")] = math.sqrt(15)
    seeds: Annotated[list[int], Doc("seeds of the small nets")] = field(default_factory=lambda: [*range(5)])
    output: Annotated[Path, Doc("folder of results")] = Path("runs/published_mnist")


Found = dict[str, list[dict[str, Any]]]  # results by row, one per seed
PAPER = {  # errors on 10 000 images, and on the digits that are not in the transfer set
    "large net": (67, None), "small net": (146, None), "distilled": (74, None),
    "without 3s": (206, 133), "without 3s, bias": (109, 14),
    "only 7s and 8s": (4730, None), "only 7s and 8s, bias": (1320, None),
}  # fmt: skip
UNSEEN = {"without 3s": [3], "only 7s and 8s": [0, 1, 2, 3, 4, 5, 6, 9]}


class Study:
    """The images and the nets; `taught` holds the large net's logits for the training images."""

    def __init__(self, args: Settings) -> None:
        self.args = args
        self.learn, self.choose, self.test = (images.Images(x.flatten(1), y) for x, y in images.mnist(args.mnist))
        self.side = math.isqrt(self.learn.x.shape[1])
        self.taught = Tensor()
        shared = ("teacher_width", "teacher_epochs", "batch_size", "lr", "jitter", "max_norm")
        self.shared = {name: getattr(args, name) for name in shared}

    def net(self, width: int, seed: int, dropped: float = 0.0) -> nn.Sequential:
        """A net with two hidden layers. `dropped` is the dropout of units; pixels have 0.4 times as much."""
        torch.manual_seed(seed)
        first = [nn.Dropout(0.4 * dropped), nn.Linear(self.learn.x.shape[1], width), nn.ReLU(), nn.Dropout(dropped)]
        return nn.Sequential(*first, nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropped), nn.Linear(width, 10))

    def fit(
        self, net: nn.Module, loss: Callable[..., Tensor], seen: Tensor, epochs: int, seed: int, folder: Path
    ) -> nn.Module:
        """Minimise a loss of logits and image indices. With dropout, also shift images and limit norms."""
        regular = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in net)
        optimizer = torch.optim.Adam(net.parameters(), self.args.lr)
        steps = epochs * math.ceil(len(seen) / self.args.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        checkpoint = Checkpoint(folder, net=net, optimizer=optimizer, schedule=schedule)
        begun = (checkpoint.load() or {"epochs": 0})["epochs"]
        for epoch in trange(begun, epochs, desc="epochs", leave=False):
            order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            for some in seen[order].split(self.args.batch_size):
                x = self.learn.x[some]
                if regular:
                    x = images.shifted(x.unflatten(1, (self.side, -1)), self.args.jitter).flatten(1)
                loss(net(x), some).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if regular:
                    shorten(net, self.args.max_norm)
            checkpoint.save(epoch + 1, {"epochs": epoch + 1})
        return net.eval()

    def teach(self) -> dict[str, Any]:
        """Train the large net with regularisation; save its logits for the images without shifts."""
        kept = self.args.output / "cells" / f"large net-{cells.key(self.shared)}.pt"

        def work(folder: Path) -> dict[str, Any]:
            net = self.net(self.args.teacher_width, seed=0, dropped=0.5)
            loss = lambda logits, some: nn.functional.cross_entropy(logits, self.learn.y[some])  # noqa: E731
            self.fit(net, loss, torch.arange(len(self.learn.y)), self.args.teacher_epochs, 0, folder)
            with files.replacing(kept) as partial:
                torch.save(logits_of(net, self.learn.x), partial)
            return {"errors": misread(logits_of(net, self.test.x), self.test.y)}

        found = cells.cell(self.args.output / "cells", "large net", self.shared, work, kept)
        self.taught = torch.load(kept, weights_only=True)
        return found

    def student(self, name: str, seed: int, width: int, temperature: float = 1.0, alpha: float = 1.0) -> dict[str, Any]:
        """The errors of a small net without regularisation, and its errors with the best bias on validation images."""
        unseen = torch.tensor(UNSEEN.get(name, []), dtype=torch.int64)
        seen = (~torch.isin(self.learn.y, unseen)).nonzero().flatten()
        epochs = max(1, round(self.args.steps / math.ceil(len(seen) / self.args.batch_size)))
        criterion = kdloss.VanillaKD(temperature, alpha)

        def work(folder: Path) -> dict[str, Any]:
            loss = lambda logits, some: criterion(logits, self.taught[some], self.learn.y[some])  # noqa: E731
            net = self.fit(self.net(width, seed), loss, seen, epochs, seed, folder)
            new, test = torch.isin(self.test.y, unseen), logits_of(net, self.test.x)
            bias = best_bias(logits_of(net, self.choose.x), self.choose.y, unseen)
            found: dict[str, Any] = {"bias": bias}
            for key, logits in {"errors": test, "corrected": raised(test, unseen, bias)}.items():
                found |= {key: misread(logits, self.test.y), f"{key}, unseen": misread(logits[new], self.test.y[new])}
            return found

        own = {"seed": seed, "width": width, "temperature": temperature, "alpha": alpha, "epochs": epochs}
        return cells.cell(self.args.output / "cells", name, self.shared | own, work)


@torch.no_grad()
def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """The logits of all images."""
    return torch.cat([net(some) for some in x.split(1000)])


def misread(logits: Tensor, labels: Tensor) -> int:
    """The number of misclassified images."""
    return int((logits.argmax(-1) != labels).sum())


def raised(logits: Tensor, digits: Tensor, bias: float) -> Tensor:
    """Add a bias to the logits of these digits."""
    return logits.index_copy(1, digits, logits[:, digits] + bias)


def best_bias(logits: Tensor, labels: Tensor, digits: Tensor) -> float:
    """The bias for these digits, from 0 to 20, with the fewest misclassified images."""
    return min((k / 10 for k in range(201)), key=lambda bias: misread(raised(logits, digits, bias), labels))


@torch.no_grad()
def shorten(net: nn.Module, longest: float) -> None:
    """Scale every row of weights that is longer than this down to this length."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight.renorm(2, 0, longest))


def rows(args: Settings) -> dict[str, tuple[str, dict[str, Any]]]:
    """By row: the name of the small net, and how it is trained."""
    kd = {"width": args.width, "temperature": args.temperature}
    trained = {
        "small net": ("small net", {"width": args.width}),
        "distilled": ("distilled", kd | {"alpha": args.alpha}),
    }
    trained |= {name: (name, kd | {"alpha": 0.0}) for name in UNSEEN}
    for width in args.narrow:
        trained[f"{width} units, labels"] = "small net", {"width": width}
        for t in args.temperatures:
            how = {"width": width, "temperature": t, "alpha": args.alpha}
            trained[f"{width} units, T = {t:g}"] = "distilled", how
    return trained


def errors(found: Found, row: str, key: str = "errors") -> list[int]:
    """The errors of each seed. A row that ends with "bias" is the same net with its bias corrected."""
    name, corrected = row.removesuffix(", bias"), row.endswith(", bias")
    return [seed[key.replace("errors", "corrected") if corrected else key] for seed in found[name]]


def tables(args: Settings, found: Found) -> str:
    """A table of errors beside the paper's, and a table of narrow nets at every temperature."""
    shown = lambda row, key: report.spread(errors(found, row, key), "{:.0f}")  # noqa: E731
    lines = [["", "errors", "the paper's", "of these, on unseen digits", "the paper's"]]
    for row, (theirs, on_unseen) in PAPER.items():
        unseen = shown(row, "errors, unseen") if row.removesuffix(", bias") in UNSEEN else ""
        lines.append([row, shown(row, "errors"), str(theirs), unseen, str(on_unseen or "")])
    narrow = [["", *(f"{width} units" for width in args.narrow)]]
    for how in ("labels", *(f"T = {t:g}" for t in args.temperatures)):
        narrow.append([how, *(shown(f"{width} units, {how}", "errors") for width in args.narrow)])
    return "\n\n".join(report.aligned(rows, box.MARKDOWN) for rows in (lines, narrow))


def picture(args: Settings, found: Found) -> Figure:
    """Plots of errors beside the paper's, and of narrow nets over the temperature."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, over = figure.subplots(1, 2)
    ours = {row: errors(found, row) for row in PAPER}
    bars.barh(list(ours), [mean(x) for x in ours.values()], color="C0", alpha=0.5, label="here, each seed a dot")
    for row, seeds in ours.items():
        bars.plot(seeds, [row] * len(seeds), "k.", markersize=4)
    bars.plot([x for x, _ in PAPER.values()], list(PAPER), "C3|", markersize=22, markeredgewidth=2, label="the paper")
    bars.set(xlabel="errors of 10 000 test images", xscale="log")
    bars.xaxis.set_major_formatter("{x:.0f}")
    bars.invert_yaxis()
    bars.legend(loc="upper right")
    for k, width in enumerate(args.narrow):
        seeds = [errors(found, f"{width} units, T = {t:g}") for t in args.temperatures]
        deviations = [stdev(x) if len(x) > 1 else 0.0 for x in seeds]
        label = f"two layers of {width}"
        over.errorbar(args.temperatures, [mean(x) for x in seeds], deviations, marker=".", capsize=3, label=label)
        alone = mean(errors(found, f"{width} units, labels"))
        over.axhline(alone, color=f"C{k}", linestyle=":", label=f"{width}, by labels")
    over.set(xlabel="temperature", ylabel="errors of 10 000 test images", xscale="log")
    over.set_xticks(args.temperatures, [f"{t:g}" for t in args.temperatures], minor=False)
    over.minorticks_off()
    over.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> Found:
    """Train the large net, then every small net for every seed, and write the results."""
    args = options.read(Settings(), arguments, __doc__)
    study = Study(args)
    found: Found = {"large net": [study.teach()]}
    trained = rows(args)
    for seed, row in tqdm([(seed, row) for row in trained for seed in args.seeds], "small nets", leave=False):
        name, how = trained[row]
        found.setdefault(row, []).append(study.student(name, seed, **how))
    files.save_json({"settings": vars(args), "found": found}, args.output / "results.json")
    print(report.put(tables(args, found), picture(args, found), args.output))
    return found


if __name__ == "__main__":
    main()
