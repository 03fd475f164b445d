"""The API page shows every name once, and every docstring on it names each parameter."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from torch import nn

NEED_AN_EXTRA = ["kdloss.cache", "kdloss.hf"]
PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
ENTRIES = {
    name: (yaml.safe_load(options) or {}).get("options", {}).get("members", True)
    for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", PAGE, re.MULTILINE)
}
SPECIAL = {"__call__", "__contains__", "__getitem__"}  # as in the filters of mkdocs.yml


def object_of(name):
    """The object that a name on the page refers to."""
    package = next((module for module in NEED_AN_EXTRA if name.startswith(f"{module}.")), "kdloss")
    entry = import_module(package)
    for part in name.removeprefix(f"{package}.").split("."):
        entry = getattr(entry, part)
    return entry


def documented():
    """All functions, classes and methods that the page shows: name, object, docstring."""
    for name, members in ENTRIES.items():
        entry = object_of(name)
        if not callable(entry):
            continue
        yield name, entry, entry.__doc__
        if not inspect.isclass(entry) or members is False:
            continue
        for member, method in vars(entry).items():
            function = getattr(method, "__func__", method)
            shown = member in members if members is not True else member in SPECIAL or not member.startswith("_")
            if shown and inspect.isfunction(function) and function.__doc__ and member != "extra_repr":
                class_too = entry.__doc__ if "see the class" in function.__doc__ else ""
                yield f"{name}.{member}", function, function.__doc__ + class_too


def words(docstring):
    """The words of a docstring's text and formulas without its examples, also with their first letter in lower case."""
    text = re.sub(r"^ *>>> .*\n(?:^ *\S.*\n)*", "", docstring, flags=re.MULTILINE)
    return {form for word in re.findall(r"\w+", text) for form in (word, word[0].lower() + word[1:])}


CALLABLES = list(documented())


@pytest.mark.parametrize(("called", "docstring"), [x[1:] for x in CALLABLES], ids=[x[0] for x in CALLABLES])
def test_a_docstring_names_every_parameter(called, docstring):
    if inspect.isclass(called) and issubclass(called, dict):
        pytest.skip("only the library creates objects of this class")
    if isinstance(called, nn.Module):
        pytest.skip("it is an object, which no user creates")
    parameters = [
        p
        for p in inspect.signature(called, follow_wrapped=not inspect.isclass(called)).parameters
        if p not in {"self", "cls"}
    ]
    assert [p for p in parameters if p not in words(docstring)] == []


def test_no_name_is_on_the_page_twice():
    names = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)
    assert len(names) == len(set(names)) == len({id(object_of(name)) for name in names})


def test_the_members_listed_by_an_entry_exist():
    chosen = [(name, member) for name, members in ENTRIES.items() if isinstance(members, list) for member in members]
    assert [(name, member) for name, member in chosen if member not in vars(object_of(name))] == []


@pytest.mark.parametrize("module", NEED_AN_EXTRA)
def test_a_module_that_needs_an_extra_has_all_its_names_on_the_page(module):
    assert [name for name in import_module(module).__all__ if f"{module}.{name}" not in ENTRIES] == []
