"""Multiplying gradients by the upstream gradient loses no digits, also on accelerators."""

import logging

import pytest
import torch

from kdloss.engine import scaled, switch


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    """Take the code path of accelerators on a CPU, with small parts."""
    monkeypatch.setattr(scaled, "on_cpu", lambda device: False)
    monkeypatch.setattr(scaled, "PART", 8)
    monkeypatch.setattr(scaled, "_compiled", [])
    monkeypatch.setattr(switch, "_mode", [False])


@pytest.fixture
def compiles(monkeypatch):
    """Record the functions that are compiled, and run them uncompiled."""
    functions = []
    monkeypatch.setattr(torch, "compile", lambda f: functions.append(f) or f)
    return functions


def third(dtype):
    """Return a gradient and a third of it, computed in float64 and rounded once."""
    gradient = torch.randn(5, 6).to(dtype)
    return gradient, (gradient.double() / 3).to(dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_third_of_a_gradient_is_rounded_once(dtype, compiled, compiles):
    switch.set_compile(compiled)
    gradient, expected = third(dtype)
    for by in (torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(1.0)):
        result, nothing = scaled.scaled([gradient, None], by)
        assert result is gradient
        assert nothing is None
        torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        if dtype.itemsize < 4:  # if 1/3 were rounded to 16 bits first, a quarter of the entries would differ
            assert (result != expected).sum() <= 1
    assert len(compiles) == compiled


def test_non_contiguous_and_small_gradients_are_multiplied_uncompiled(compiles):
    switch.set_compile(True)
    for gradient in (torch.randn(6, 5).T, torch.randn(7)):
        expected = gradient.double() / 3
        torch.testing.assert_close(scaled.scaled([gradient], torch.tensor(1 / 3))[0].double(), expected)
    assert not compiles


def test_without_a_compiler_gradients_are_multiplied_uncompiled_with_one_warning(monkeypatch, caplog):
    def none(function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", none)
    switch.set_compile(True)
    with caplog.at_level(logging.WARNING, "kdloss"):
        for _ in range(2):
            gradient, expected = third(torch.float32)
            torch.testing.assert_close(scaled.scaled([gradient], torch.tensor(1 / 3))[0], expected)
    assert ["no compiler here" in record.message for record in caplog.records] == [True]
