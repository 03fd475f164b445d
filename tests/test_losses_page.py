"""docs/losses.md has a row for every loss, and agrees with docstrings and recipes."""

import inspect
import re
from pathlib import Path

import pytest

import kdloss
from kdloss import distances, divergences

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "losses.md").read_text()
API = (DOCS / "api.md").read_text()
HEAD = ["loss", "formula", "when", "published weight", "cost", "paper"]
LINK = re.compile(r"\[`(\w+)`\]\(api\.md#kdloss\.(\w+\.)?(\w+)\)")


def cells(line: str) -> list[str]:
    """The cells of a row; no formula on the page contains a bar."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows() -> dict[str, dict[str, str]]:
    """The rows by the name of the loss, with that of its module in front."""
    found = {}
    for table in re.findall(r"((?:^\|.*\n)+)", PAGE, re.MULTILINE):
        head, _, *body = (cells(line) for line in table.splitlines())
        if head == HEAD:
            for row in body:
                assert len(row) == len(HEAD), row
                link = LINK.fullmatch(row[0])
                assert link, f"{row[0]} has no link to its place in the API page"
                assert link[1] == link[3]
                found[f"{link[2] or ''}{link[3]}"] = dict(zip(HEAD, row, strict=True))
    return found


ROWS = rows()
NAMED = {f"{module.__name__.split('.')[-1]}.{name}" for module in (divergences, distances) for name in module.__all__}
HELPERS = {f"distances.{name}" for name in ("between_examples", "between_tokens", "examples", "tokens")}
LOSSES = sorted(NAMED - HELPERS)


def about(name: str) -> str:
    """The docstring in one line."""
    module, _, own = name.rpartition(".")
    return " ".join((inspect.getdoc(getattr(getattr(kdloss, module) if module else kdloss, own)) or "").split())


def plain(formula: str) -> str:
    """A formula without spaces and with the bars of docstrings, which a table has to write in another way."""
    for table, docstring in ((r"\Vert", r"\|"), (r"\lvert", "|"), (r"\rvert", "|"), (r"\mid", "|"), (r"\,", "")):
        formula = formula.replace(table, docstring)
    return re.sub(r"\s", "", formula)


def test_every_loss_has_a_row_and_a_link_to_its_place_in_the_api_page():
    assert set(ROWS) == set(LOSSES) | {"CrossEntropy", "Task"}
    helpers = {f"{module}{name}" for shown, module, name in LINK.findall(PAGE) if shown == name}
    assert helpers >= HELPERS
    assert [name for name in {*ROWS, *HELPERS} if f"::: kdloss.{name}\n" not in API] == []


@pytest.mark.parametrize("name", LOSSES)
def test_the_formulas_of_a_row_are_in_the_docstring(name):
    formulas, text = re.findall(r"\$(.+?)\$", ROWS[name]["formula"]), plain(about(name))
    assert formulas
    assert [x for x in formulas if plain(x) not in text and x != "T^2"] == []


@pytest.mark.parametrize("name", LOSSES)
def test_the_papers_and_years_of_a_row_are_those_of_the_docstring(name):
    paper, text = ROWS[name]["paper"], about(name)
    written = re.findall(r"arXiv:(\d{4}\.\d{5}|\d{4}\.\d{4})", text)
    linked = re.findall(r"\[([\d.]+)\]\(https://arxiv\.org/abs/\1\)", paper)
    assert linked == written
    assert re.findall(r"doi\.org/([^)]+)", paper) == ([] if linked else re.findall(r"doi:(\S+?)\.?(?=\s|$)", text))
    words = set(re.findall(r"[^\W_]{2,}", re.sub(r"\[.*?\]\(.*?\)", "", paper))) - {"et", "al", "none"}
    assert [word for word in sorted(words) if word not in text] == []
    assert any(word.isdigit() for word in words) == (paper != "none") == bool(re.search(r"\b(19|20)\d\d, \"", text))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_published_weight_is_in_the_linked_recipe(name):
    weight = ROWS[name]["published weight"]
    assert ("](recipes_" in weight) == (weight != "none stated") or name in ("CrossEntropy", "Task")
    for part in weight.split(";"):
        for page, anchor in re.findall(r"\]\((recipes_\w+\.md)#([\w-]+)\)", part):
            code = recipe_of(page, anchor)
            numbers = {float(x) for x in re.findall(r"\d+(?:\.\d*)?(?:e-?\d+)?", code)}
            said = float(re.match(r"\s*([\d.]+(?:e-?\d+)?)", part)[1])
            assert said in numbers or (anchor == "kd" and round(1 - said, 9) in numbers)
            assert name.split(".")[-1] in code or name in ("distances.mse", "divergences.forward_kl")


def recipe_of(page: str, anchor: str) -> str:
    """The first block of Python under a heading."""
    text = (DOCS / page).read_text()
    titles = re.findall(r"^### (.+)$", text, re.MULTILINE)
    title = next(x for x in titles if re.sub(r"\W+", "-", x.lower()) == anchor)
    section = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert code
    return code[1]


def test_the_cost_is_one_pass_exactly_for_divergences_with_a_closed_form():
    for name in divergences.__all__:
        function, cost = getattr(divergences, name), ROWS[f"divergences.{name}"]["cost"]
        closed = getattr(function, "closed_form", None) is not None and name != "sinkhorn"
        if not isinstance(function, type):  # a class wraps other divergences and has no closed form
            assert (cost == "one pass") == closed, name
            assert cost.startswith("full logits") == (name in ("dist", "uld")), name
