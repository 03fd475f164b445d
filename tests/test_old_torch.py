"""Limits of older torch versions that tests on a newer torch do not show."""

import ast
import re
from pathlib import Path

import pytest
import torch

import kdloss

FILES = sorted(Path(kdloss.__file__).parent.rglob("*.py"))


def test_isinstance_is_never_called_with_a_union_which_torch_before_2_10_does_not_compile():
    """Nor with the name of a union, such as `AnyLogits`: write types, or a tuple of types, instead."""
    trees = [(path, ast.parse(path.read_text())) for path in FILES]
    unions = {
        target.id
        for _, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _union(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [
        (path.name, node.lineno)
        for path, tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if _union(node.args[1]) or getattr(node.args[1], "id", "") in unions
    ]
    assert {"AnyLogits", "Layers"} <= unions
    assert calls == []


def _union(node):
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def test_tests_of_scripts_are_left_out_where_what_scripts_need_is_not_installed():
    root = Path(__file__).parent.parent
    scripts = {path.stem for path in (root / "applications").glob("*.py")}
    entry = re.search(r"^NEWER := (.*?[^\\])$", (root / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[1]
    left_out = re.compile("|".join(name.replace("%", ".*") for name in entry.replace("\\\n", " ").split()))
    found = set()
    for path in (root / "tests").glob("test_*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        found |= {path.stem.removeprefix("test_")} if names & scripts else set()
    assert {"cli", "cross_tokenizer", "forgetting"} <= found
    assert [name for name in sorted(found) if not left_out.fullmatch(name)] == []


@pytest.mark.filterwarnings("ignore")  # warnings of torch about the code that it traces
def test_a_criterion_compiles_where_graph_breaks_are_allowed():
    criterion = kdloss.VanillaKD(2.0, 0.3)
    student, teacher, labels = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 5, -100, 2])

    def gradient(loss):
        x = student.clone().requires_grad_()
        value = loss(x, teacher, labels)
        return value.detach(), *torch.autograd.grad(value, x)

    torch.testing.assert_close(gradient(torch.compile(criterion, backend="aot_eager")), gradient(criterion))
