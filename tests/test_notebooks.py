"""The notebooks run from first cell to last; `python tests/test_notebooks.py` draws their figures again."""

import json
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(book):
    return json.loads(book.read_text())["cells"]


def run(book):
    """Run every code cell in one namespace, and return the figure that it drew."""
    matplotlib.use("agg")
    names = {}
    for number, cell in enumerate(cells(book)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{book.name} cell {number}", "exec"), names)
    return names["figure"]


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.stem)
def test_a_notebook_runs(book, capsys):
    assert run(book).axes
    assert capsys.readouterr().out


def test_the_notebooks_contain_no_outputs():
    assert NOTEBOOKS
    code = [cell for book in NOTEBOOKS for cell in cells(book) if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


if __name__ == "__main__":
    for book in NOTEBOOKS:
        run(book).savefig(book.with_suffix(".png"), dpi=80)
