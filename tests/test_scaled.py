"""Gradients times what comes from above keep its digits, on accelerators, too."""

import logging

import pytest
import torch

from kdloss.engine import scaled, switch


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    """With little to multiply at a time."""
    monkeypatch.setattr(scaled, "on_cpu", lambda device: False)
    monkeypatch.setattr(scaled, "PART", 8)
    monkeypatch.setattr(scaled, "_compiled", [])
    monkeypatch.setattr(switch, "_mode", [False])


@pytest.fixture
def compiles(monkeypatch):
    """How often something is compiled; run as it is."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f: seen.append(f) or f)
    return seen


def third(dtype):
    """A gradient, and a third of it, in float64 and then rounded."""
    gradient = torch.randn(5, 6).to(dtype)
    return gradient, (gradient.double() / 3).to(dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_third_of_a_gradient_is_rounded_once(dtype, compiled, compiles):
    switch.set_compile(compiled)
    gradient, expected = third(dtype)
    for by in (torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(1.0)):
        found, nothing = scaled.scaled([gradient, None], by)
        assert found is gradient
        assert nothing is None
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        if dtype.itemsize < 4:  # a third that is rounded to 16 bits itself changes every fourth
            assert (found != expected).sum() <= 1
    assert len(compiles) == compiled


def test_what_lies_otherwise_in_memory_and_little_is_multiplied_uncompiled(compiles):
    switch.set_compile(True)
    for gradient in (torch.randn(6, 5).T, torch.randn(7)):
        expected = gradient.double() / 3
        torch.testing.assert_close(scaled.scaled([gradient], torch.tensor(1 / 3))[0].double(), expected)
    assert not compiles


def test_without_a_compiler_it_is_multiplied_uncompiled_which_is_said_once(monkeypatch, caplog):
    def none(function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", none)
    switch.set_compile(True)
    with caplog.at_level(logging.WARNING, "kdloss"):
        for _ in range(2):
            gradient, expected = third(torch.float32)
            torch.testing.assert_close(scaled.scaled([gradient], torch.tensor(1 / 3))[0], expected)
    assert ["no compiler here" in record.message for record in caplog.records] == [True]
