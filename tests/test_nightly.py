"""The fuzzer of `make nightly`, on a few cases."""

import re

import fuzz
import pytest
import torch
from drawing import draw

import kdloss

CASES = 60


def test_cases_agree_with_float64():
    assert fuzz.main(["--cases", str(CASES)]) == 0


@pytest.mark.parametrize("number", [3, 17])
def test_a_case_depends_only_on_its_number(number):
    one, again = draw(0, number), draw(0, number)
    assert one.words == again.words
    for mine, other in zip(one.student.leaves, again.student.leaves, strict=True):
        torch.testing.assert_close(mine.base, other.base, rtol=0, atol=0, equal_nan=True)
    assert draw(1, number).words != one.words


def test_400_cases_cover_the_options_of_a_criterion():
    words = " ".join(word for number in range(400) for word in draw(0, number).words)
    kinds = ("lazy student", "lazy teacher", "top-k", "teacher=all", "TokenMap", "truncate", "causal", "overwrite")
    kinds += ("kept by mask", "ignored", "soft labels", "-inf", "huge", "garbage=nan", "FeatureKD", "projection")
    kinds += ("float16", "float64", "expanded", "reduction=none", "items", *(x for x in kdloss.divergences.__all__))
    assert [kind for kind in kinds if kind not in words and kind != "standardized"] == []


def test_a_wrong_gradient_is_found_and_the_command_that_repeats_its_case_is_printed(monkeypatch, capsys):
    correct = fuzz.ours

    def wrong(case):
        value, gradients, components = correct(case)
        return value, [1.001 * g + 1e-3 for g in gradients], components

    monkeypatch.setattr(fuzz, "ours", wrong)
    assert fuzz.main(["--cases", "20"]) == 1
    number = re.search(r"fuzz.py --seed 0 --first (\d+) --cases 1", capsys.readouterr().out).group(1)
    assert fuzz.main(["--first", number, "--cases", "1"]) == 1
    monkeypatch.setattr(fuzz, "ours", correct)
    assert fuzz.main(["--first", number, "--cases", "1"]) == 0
