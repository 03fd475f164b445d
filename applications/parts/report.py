"""Write results as a Markdown table, as JSON and as a picture."""

import itertools
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Column, Table

from parts import files

COLUMNS = {  # heading: (key, format)
    "right %": ("accuracy", "{:.1f}"),
    "MRR %": ("mrr", "{:.1f}"),
    "first %": ("recall_1", "{:.1f}"),
    "among ten %": ("recall_10", "{:.1f}"),
    "of the teacher's %": ("share", "{:.1f}"),
    "held-out perplexity": ("perplexity", "{:.1f}"),
    "old perplexity": ("old_perplexity", "{:.1f}"),
    "against none %": ("against_none", "{:+.1f}"),
    "lowest on the way": ("lowest_perplexity", "{:.1f}"),
    "retention %": ("retention", "{:.1f}"),
    "gained": ("gained", "{:+.1f}"),
    "bits/character": ("bits_per_character", "{:.3f}"),
    "samples": ("samples", "{:.1f}"),
    "own": ("own", "{:.1f}"),
    "ROUGE-1": ("rouge_1", "{:.2f}"),
    "ROUGE-2": ("rouge_2", "{:.2f}"),
    "ROUGE-L": ("rouge_l", "{:.2f}"),
    "distinct-2 %": ("distinct_2", "{:.1f}"),
    "cache MB": ("cache_megabytes", "{:.1f}"),
    "steps": ("steps", "{:.0f}"),
    "TFLOP": ("teraflop", "{:,.2f}"),
    "seconds": ("seconds", "{:.0f}"),
    "train tok/s": ("trained_tokens_per_second", "{:.0f}"),
    "generate tok/s": ("generated_tokens_per_second", "{:.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "smaller": ("compression", "{:.2f}x"),
    "train MB": ("training_megabytes", "{:.0f}"),
    "learning rate": ("lr", "{:g}"),
}

Runs = Mapping[str, Sequence[dict[str, Any]]]
Curve = Sequence[tuple[int, float]]  # perplexity over steps


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """The mean and standard deviation over the seeds, for every number."""
    numbers = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    columns = {key: [run[key] for run in runs] for key in numbers}
    return {key: (mean(x), stdev(x) if len(x) > 1 else 0.0) for key, x in columns.items()}


def table(runs: Runs) -> str:
    """A Markdown table with one row per method; mean ± standard deviation if there are several seeds."""
    known = {key for seeds in runs.values() for run in seeds for key in run}
    columns = {heading: (key, form) for heading, (key, form) in COLUMNS.items() if key in known}
    lines = [["", *columns]]
    for method, seeds in runs.items():
        found = summary(seeds)
        cells = [_cell(found.get(key), form, len(seeds) > 1) for key, form in columns.values()]
        lines.append([method, *cells])
    return aligned(lines, box.MARKDOWN)


def aligned(rows: Sequence[Sequence[str]], lines: box.Box | None = None) -> str:
    """Format rows as a table, headings first. Without `lines`, columns are separated by spaces."""
    made = Table(rows[0][0], *(Column(heading, justify="right") for heading in rows[0][1:]), box=lines)
    made.pad_edge = lines is not None
    for row in rows[1:]:
        made.add_row(*row)
    console = Console(file=StringIO(), width=10_000, markup=False, emoji=False, highlight=False)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())


def spread(values: Sequence[float], form: str) -> str:
    """Format the mean and, if there are several values, the standard deviation."""
    deviation = f" ± {form.format(stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    return form.format(mean(values)) + deviation


def _cell(value: tuple[float, float] | None, form: str, several: bool) -> str:
    if value is None:
        return "-"
    average, deviation = value
    spread = several and deviation > 0
    return form.format(average) + (f" ± {form.format(deviation).lstrip('+')}" if spread else "")


def write(runs: Runs, settings: Mapping[str, Any], folder: Path, notes: str) -> str:
    """Write results.json, results.md and results.png; return the table to print."""
    means = {
        row: {name: {"mean": m, "deviation": d} for name, (m, d) in summary(seeds).items()}
        for row, seeds in runs.items()
    }
    shown = "\n".join([table(runs), "", notes])
    files.save_json({"settings": settings, "summary": means, "runs": runs}, folder / "results.json")
    return put(shown, picture(runs), folder)


def put(shown: str, figure: Figure, folder: Path) -> str:
    """Write results.md and results.png; return the text to print."""
    with files.replacing(folder / "results.md") as partial:
        partial.write_text(shown + "\n", encoding="utf-8")
    with files.replacing(folder / "results.png") as partial:
        figure.savefig(partial, dpi=110, format="png")
    return f"\n{shown}\n\nwritten: {folder}/results.json, results.md, results.png"


def beside(found: dict[str, Any], teacher: Mapping[str, Any], alone: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Add to results the comparisons with the teacher and with the student trained alone."""
    more = {
        "retention": 100 * teacher["perplexity"] / found["perplexity"],
        "compression": teacher["parameters"] / found["parameters"],
    }
    if alone is not None:
        more["against_none"] = 100 * (found["perplexity"] / alone["perplexity"] - 1)
    return found | more


def picture(runs: Runs) -> Figure:
    """Bars for the students' results, lines for teachers; with up to 8 students, learning curves, too."""
    students = [row for row, found in runs.items() if "curve" in found[0]]
    levels = {
        row: summary(found)["perplexity"][0]
        for row, found in runs.items()
        if row not in students and "perplexity" in found[0]
    }
    panels = 3 if len(students) <= 8 else 1
    figure = Figure(figsize=(5 * panels if panels > 1 else 9, max(4.6, 0.35 * len(runs))), layout="constrained")
    *over, bars = figure.subplots(1, panels, squeeze=False)[0]
    for axes, unit in zip(over, ("steps", "teraflop"), strict=False):
        _learning_curves(axes, {row: runs[row] for row in students}, unit)
    heights = [summary(runs[row])["perplexity"] for row in students]
    drawn = bars.barh(students, [m for m, _ in heights], xerr=[d for _, d in heights])
    for bar, i in zip(drawn, range(len(students)), strict=True):
        bar.set_color(f"C{i}" if over else "C0")
    bars.bar_label(drawn, fmt="%.1f", label_type="center", color="white")
    for (row, level), style in zip(levels.items(), itertools.cycle([":", "-.", "--"])):
        for axes in over:
            axes.axhline(level, color="black", linewidth=1, linestyle=style, label=row)
        bars.axvline(level, color="black", linewidth=1, linestyle=style, label=row)
    if over or levels:
        (over or [bars])[0].legend(fontsize="small")
    bars.invert_yaxis()
    bars.set(xlabel="held-out perplexity at the end (less is better)")
    return figure


def _learning_curves(axes: Axes, students: Runs, unit: str) -> None:
    for i, (row, seeds) in enumerate(students.items()):
        for nth, run in enumerate(seeds):
            style = {"color": f"C{i}", "marker": ".", "label": row if nth == 0 else None}
            style["linestyle"] = "--" if "compute" in row else "-"
            seen = [point for point in run["curve"] if point["step"] > 0]
            reached = [point["step"] / run["steps"] * run[unit] for point in seen]
            axes.plot(reached, [point["perplexity"] for point in seen], **style)
    axes.set(xlabel={"steps": "training steps", "teraflop": "TFLOP of training, with the teacher's passes"}[unit])
    axes.set(ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")


def curves(perplexities: Mapping[str, float], curves: Mapping[str, Curve], folder: Path) -> str:
    """Write perplexities as results.md and their curves as results.png; return the table to print."""
    rows = [["", "held-out perplexity"], *([name, f"{value:.1f}"] for name, value in perplexities.items())]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, value in perplexities.items():
        if name in curves:
            axes.plot(*zip(*curves[name], strict=True), marker=".", label=name)
        else:
            axes.axhline(value, color="black", linestyle=":", label=name)
    axes.set(xlabel="training steps", ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.legend()
    return put(aligned(rows, box.MARKDOWN), figure, folder)
