"""The picture of docs/what_counts.md: two rows of a batch, and which positions count.

`python docs/pictures/what_counts.py` writes what_counts_light.png and what_counts_dark.png beside this file.
"""

from pathlib import Path
from typing import Any

PAD = "<pad>"
TOKENS = [["What", "is", "1+3", "?", "It", "is", "4"], ["Who", "?", "Ada", ".", PAD, PAD, PAD]]
PROMPTS = [4, 2]  # how many tokens of each row are the question, which is not to be learned
IGNORED = -100

ATTENTION = [[int(token != PAD) for token in row] for row in TOKENS]
LABELS = [
    [token if token != PAD and t >= prompt else IGNORED for t, token in enumerate(row)]
    for row, prompt in zip(TOKENS, PROMPTS, strict=True)
]
# Logits at t are held against label t+1: the last position has none.
BY_LABELS = [[t + 1 < len(row) and row[t + 1] != IGNORED for t in range(len(row))] for row in LABELS]
BY_MASK = [[t + 1 < len(row) and row[t + 1] == 1 for t in range(len(row))] for row in ATTENTION]

COLORS = {
    "light": {"back": "#ffffff", "text": "#222222", "line": "#9e9e9e", "on": "#a5d6a7", "also": "#90caf9"},
    "dark": {"back": "#1e2129", "text": "#e6e6e6", "line": "#6b7080", "on": "#2e7d32", "also": "#1565c0"},
}


def draw(theme: str, folder: Path) -> Path:
    """The picture on a light or a dark page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    color = COLORS[theme]
    figure, axes = plt.subplots(figsize=(7.6, 6.6), facecolor=color["back"])
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set_axis_off()
    top = 0.0
    for k in range(len(TOKENS)):
        axes.text(-2.55, top - 0.1, f"Sequence {k + 1}", color=color["text"], fontsize=13, weight="bold", va="center")
        row(axes, color, top - 0.85, "input_ids", TOKENS[k])
        row(axes, color, top - 1.75, "attention_mask", ATTENTION[k])
        row(axes, color, top - 2.65, "labels", LABELS[k], [x != IGNORED for x in LABELS[k]], "line")
        arrows(axes, color, top - 3.18, BY_LABELS[k])
        row(axes, color, top - 4.15, "logits that count", range(7), BY_LABELS[k], "on")
        row(axes, color, top - 5.05, 'positions="mask"', range(7), BY_MASK[k], "also")
        top -= 6.4
    axes.set_xlim(-2.65, 7.05)
    axes.set_ylim(top + 0.65, 0.25)
    path = folder / f"what_counts_{theme}.png"
    figure.savefig(path, dpi=150, facecolor=color["back"])
    plt.close(figure)
    return path


def row(axes: Any, color: dict[str, str], y: float, name: str, cells: Any, marked: Any = (), how: str = "") -> None:
    """One line of cells, some of them filled."""
    from matplotlib.patches import Rectangle

    axes.text(-0.15, y, name, color=color["text"], fontsize=11.5, ha="right", va="center", family="monospace")
    for t, cell in enumerate(cells):
        on = bool(marked and marked[t])
        fill = color[how] if on and how != "line" else "none"
        axes.add_patch(
            Rectangle((t + 0.04, y - 0.36), 0.92, 0.72, facecolor=fill, edgecolor=color["line"], linewidth=1)
        )
        faint = bool(marked) and not on
        axes.text(
            t + 0.5,
            y,
            str(cell),
            color=color["text"],
            alpha=0.45 if faint else 1,
            fontsize=11.5,
            ha="center",
            va="center",
        )


def arrows(axes: Any, color: dict[str, str], y: float, counted: list[bool]) -> None:
    """From each label that is learned to the logits that learn it."""
    for t, on in enumerate(counted):
        if on:
            axes.annotate(
                "",
                xy=(t + 0.5, y - 0.57),
                xytext=(t + 1.5, y + 0.14),
                arrowprops={"arrowstyle": "-|>", "color": color["text"], "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0},
            )


if __name__ == "__main__":
    for one in COLORS:
        print(draw(one, Path(__file__).parent))
