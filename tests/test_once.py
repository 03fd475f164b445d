"""`once`, the operator that makes a compiler compute a number of a row only once."""

import torch

from kdloss.engine import compiled
from kdloss.engine.once import _once, once


def test_the_operator_matches_its_schema_and_returns_a_copy():
    rows = torch.randn(3, 1)
    torch.library.opcheck(_once, (rows,), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(_once(rows), rows)
    assert _once(rows).data_ptr() != rows.data_ptr()


def test_once_copies_nothing_on_a_cpu_whether_compiled_or_not():
    rows = torch.randn(3, 1)
    assert once(rows) is rows
    traced = []

    def graph(module, _):
        traced.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(lambda x: once(x) + 1, backend=graph)(rows)
    assert traced
    assert not any("once" in target for target in traced)


def test_compiler_options_that_this_torch_does_not_have_are_left_out(monkeypatch):
    monkeypatch.setitem(compiled.OPTIONS, "no_such_option", True)
    assert "no_such_option" not in compiled._options()
    assert compiled._options()["realize_reads_threshold"] == 1000
