"""Draw one picture for each question of docs/results.md, from the measurements of `benchmarks/results.py`.

python benchmarks/questions.py [name ...]
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RUNS, PICTURES = ROOT / "runs" / "results", ROOT / "docs" / "results"
ALONE, TEACHER = "0.45", "black"  # their colours in every picture
WAYS = {  # name in the picture: row of compare.py
    "alone": "none",
    "alone, as many operations": "none-same-compute",
    "features": "feature",
    "logits": "vanilla",
    "both": "both",
}

Seeds = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Seeds]


def runs(study: str) -> Runs:
    """All rows of a study, with the runs of all seeds."""
    found: Runs = json.loads((RUNS / study / "results.json").read_text(encoding="utf-8"))["runs"]
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def numbers(seeds: Seeds, key: str = "perplexity") -> list[float]:
    """One number per seed."""
    return [found[key] for found in seeds]


def share(seeds: Seeds, alone: Seeds) -> list[float]:
    """Perplexity in percent of the student trained alone with the same seed."""
    return [100 * a / b for a, b in zip(numbers(seeds), numbers(alone), strict=True)]


def line(axes: Axes, points: Mapping[float, Sequence[float]], label: str, at: int = -1, **style: Any) -> None:
    """Plot means and standard deviations over the varied setting; the label is at point `at`."""
    xs = sorted(points)
    means, deviations = zip(*(spread(points[x]) for x in xs), strict=True)
    drawn = axes.errorbar(xs, means, deviations, marker="o", capsize=4, **style)
    colour = drawn[0].get_color()
    axes.annotate(label, (xs[at], means[at]), (10, 0), textcoords="offset points", color=colour, va="center")


def level(axes: Axes, height: float, label: str, colour: str) -> None:
    """Draw a horizontal line for a value that does not depend on the varied setting."""
    axes.axhline(height, color=colour, linewidth=1, linestyle="--")
    axes.annotate(
        label, (0.01, height), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color=colour
    )


def bars(axes: Axes, rows: Mapping[str, Sequence[float]], **style: Any) -> None:
    """One bar for each row, the first at the top."""
    names = list(rows)[::-1]
    means, deviations = zip(*(spread(rows[name]) for name in names), strict=True)
    colours = [ALONE if name.startswith("alone") else "C0" for name in names]
    drawn = axes.barh(names, means, xerr=deviations, color=colours, error_kw={"capsize": 4}, **style)
    axes.bar_label(drawn, fmt="%.0f", padding=6, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def varied(study: Runs, flag: str, standard: float, method: str = "vanilla") -> dict[float, Seeds]:
    """The rows of a method by the value of a flag; `standard` is the value of the row without the flag in its name."""
    named = {row.removeprefix(f"{method}, {flag} "): found for row, found in study.items()}
    return {standard: study[method]} | {float(value): found for value, found in named.items() if _is_number(value)}


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def beside(axes: Axes, seeds: Seeds, label: str, colour: str = TEACHER, key: str = "perplexity") -> None:
    """Draw a row as a line across the bars."""
    height = mean(numbers(seeds, key))
    axes.axvline(height, color=colour, linewidth=1, linestyle="--")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    axes.annotate(f"{label} {height:.0f}", (height, 1), (0, 2), color=colour, **place)


def one(width: float = 7.5) -> tuple[Figure, Axes]:
    """A figure with one set of axes, and room for labels on the right."""
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    return figure, axes


def temperature() -> Figure:
    """What does T do?"""
    figure, axes = one()
    pairs = {"2.5 times smaller": "output", "11 times smaller": "gap", "a Llama under a GPT-2": "unlike"}
    for name, study in pairs.items():
        found = runs(study)
        points = {t: share(seeds, found["none"]) for t, seeds in varied(found, "temperature", 1.0).items()}
        line(axes, points, name)
    level(axes, 100, "the same student alone", ALONE)
    axes.set(xscale="log", xlabel="temperature T", ylabel="perplexity, % of alone (less is better)")
    axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_xlim(0.45, 21)
    return figure


def alpha() -> Figure:
    """How much cross-entropy?"""
    figure, axes = one()
    for name, study, at in (("a good teacher", "output", -1), ("a teacher worse than its student", "weak-teacher", 0)):
        found = runs(study)
        line(axes, {a: share(s, found["none"]) for a, s in varied(found, "alpha", 0.1).items()}, name, at)
    level(axes, 100, "the same student alone", ALONE)
    axes.set(
        xlabel="alpha, the share of cross-entropy", ylabel="perplexity, % of alone (less is better)", xlim=(-0.04, 1.12)
    )
    return figure


def kinds() -> Figure:
    """Features or logits? At equal steps, and against a baseline of equal compute."""
    figure, axes = one()
    found = runs("demo")
    bars(axes, {name: numbers(found[row]) for name, row in WAYS.items()})
    beside(axes, found["teacher"], "teacher")
    axes.set(xlabel="held-out perplexity (less is better)")
    return figure


def layers() -> Figure:
    """Which layers, pairing, distance?"""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    found = runs("features")
    standard = {"layers": "auto", "pairing": "uniform", "distance": "layer_norm_mse"}
    for axes, (flag, value) in zip(figure.subplots(1, 3, sharex=True), standard.items(), strict=True):
        rows = {value: found["feature"]}
        rows |= {row.removeprefix(f"feature, {flag} "): x for row, x in found.items() if f", {flag} " in row}
        bars(axes, {name: numbers(seeds) for name, seeds in rows.items()})
        beside(axes, found["none"], "alone", ALONE)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="held-out perplexity (less is better)")
        axes.set_title(flag, loc="left", pad=18)
        axes.margins(x=0.15)
    return figure


def size() -> Figure:
    """How much smaller?"""
    found, (figure, axes) = runs("size"), one()
    for method, name, colour in (("none", "alone", ALONE), ("vanilla", "distilled", "C0")):
        rows = varied(found, "student-width", 96, method).values()
        line(axes, {seeds[0]["compression"]: numbers(seeds) for seeds in rows}, name, color=colour)
    level(axes, mean(numbers(found["teacher"])), "teacher", TEACHER)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="times smaller than the teacher",
        ylabel="held-out perplexity (less is better)",
    )
    axes.set_xticks(ticks := [1.5, 2.5, 5, 10, 25], [f"{x:g}" for x in ticks])
    axes.set_yticks(ticks := [100, 200, 400], map(str, ticks))
    axes.minorticks_off()
    return figure


def data() -> Figure:
    """How little data?"""
    found, (figure, axes) = runs("data"), one()
    for method, name, colour in (("none", "alone", ALONE), ("feature", "features", "C1"), ("vanilla", "logits", "C0")):
        rows = varied(found, "student-blocks", 768, method)
        line(axes, {blocks * 64: numbers(seeds) for blocks, seeds in rows.items()}, name, color=colour)
    level(axes, mean(numbers(found["teacher"])), "teacher", TEACHER)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the student's text (many epochs)")
    axes.set_xticks(ticks := [1_500, 3_000, 6_000, 12_000, 25_000, 50_000], [f"{x:,}" for x in ticks])
    axes.xaxis.minorticks_off()
    axes.set(ylabel="held-out perplexity (less is better)")
    axes.set_yticks(ticks := [100, 200, 400, 800, 1600, 3200], map(str, ticks))
    axes.yaxis.minorticks_off()
    return figure


def real() -> Figure:
    """A real model: SmolLM2, with fresh and with little text."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    both = zip(figure.subplots(1, 2, sharey=True), ("fresh", "little"), strict=True)
    for axes, text in both:
        found = runs(f"smollm2-20-{text}")
        bars(axes, {name: numbers(found[row]) for name, row in WAYS.items()})
        beside(axes, found["teacher"], "teacher")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="held-out perplexity (less is better)")
        axes.set_title(f"{text} text", loc="left", pad=18)
    return figure


def divergences() -> Figure:
    """Which divergence? The student's perplexity, and the text that it samples."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    found = runs("divergences")
    rows = {"alone": found["none"]}
    for row, seeds in found.items():
        if row.startswith("vanilla, divergence ") and row.endswith(alone := ", alpha 0"):  # without cross-entropy
            rows[row.removeprefix("vanilla, divergence ").removesuffix(alone)] = seeds
    asked = {
        "perplexity": "held-out perplexity (less is better)",
        "samples": "teacher's perplexity on its samples\n(less is more likely)",
        "own": "its own perplexity on its samples\n(less is more certain, and less varied)",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), asked.items(), strict=True):
        bars(axes, {name: numbers(seeds, key) for name, seeds in rows.items()})
        beside(axes, found["teacher"], "teacher", key=key)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel=label)
        axes.margins(x=0.15)
    return figure


QUESTIONS: dict[str, Callable[[], Figure]] = {
    "temperature": temperature,
    "alpha": alpha,
    "kinds": kinds,
    "layers": layers,
    "divergences": divergences,
    "size": size,
    "data": data,
    "real": real,
}


def measured(name: str) -> bool:
    """Whether all results that a picture needs exist."""
    try:
        QUESTIONS[name]()
    except FileNotFoundError:
        return False
    return True


def main(names: Sequence[str]) -> None:
    """Draw the pictures with these names, or all."""
    for name in names or QUESTIONS:
        QUESTIONS[name]().savefig(PICTURES / f"question-{name}.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
