"""The measuring functions of `make bench` on cases with known results, and each of its sections at a tiny size."""

import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import gpu
import liger
import measure
import pytest
import recipes
import small
import torch
from measure import Row
from parts.memory import LiveTensors
from sections import functions, heads, logits, steps

import kdloss


def test_the_peak_is_that_of_the_allocated_tensors():
    x = torch.randn(250, 1000)

    def step():
        a = x + 1  # 1 MB
        b = a * 2
        del a
        c = b.exp()
        d = c + 1  # three megabytes are allocated
        return d.sum()

    assert measure.peak(step) == pytest.approx(3 * x.nbytes, abs=100)


def test_the_peak_is_that_of_live_tensors_if_operators_allocate_nothing_inside():
    """Operators may allocate inside: a float64 sum of float32 numbers makes a copy first."""
    student, teacher = torch.randn(2, 64, 3000)
    labels = torch.zeros(64).long()
    step = measure.backward(recipes.kl_ce, student.requires_grad_(), teacher, labels)
    with LiveTensors() as live:
        for tensor in (student, teacher, labels):
            live.count(tensor.untyped_storage())
        before = live.now
        step()
    assert measure.peak(step) == pytest.approx(live.peak - before, rel=0.02)
    assert measure.peak(lambda: student.sum(dtype=torch.float64)) == pytest.approx(2 * student.nbytes, rel=0.01)


def test_the_ratio_is_the_median_over_pairs_of_alternating_order(monkeypatch):
    now, ran = [0.0], []
    monkeypatch.setattr(measure.time, "process_time", lambda: now[0])

    def step(name, *seconds):
        left = iter(seconds)

        def run():
            ran.append(name)
            now[0] += next(left)

        return run

    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    # two warm-up runs of each, then the pairs 1/2, 4/1, 3/1
    ratio, ms = measure.paired(step("ours", 9, 9, 1, 4, 3), step("other", 9, 9, 2, 1, 1), rounds=3)
    assert (ratio, ms) == (3, 3000)
    assert "".join(name[1] for name in ran[4:]) == "tu" + "ut" + "tu"  # the order alternates from pair to pair


def test_if_freed_memory_is_kept_the_warm_up_lasts_until_there_are_no_new_pages(monkeypatch):
    faults = iter([0, 5000, 9000, 9000, 9020])
    monkeypatch.setattr(measure.resource, "getrusage", lambda _: SimpleNamespace(ru_minflt=next(faults)))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    ran = []
    measure.warm_up(lambda: ran.append("ours"))
    assert len(ran) == 3


def test_a_missed_goal_is_in_bold_in_its_row():
    assert str(Row("KL", "here", 1.234, 1.0, "3 ms")) == "| KL | here | 3 ms | **1.23** | ≤ 1 |"
    assert str(Row("KL", "here", 0.5, 1.0)) == "| KL | here |  | 0.5 | ≤ 1 |"
    assert str(Row("reads", "here", 3.0, 4.0, least=True)) == "| reads | here |  | **3** | ≥ 4 |"


FAULTS = """
import resource, torch
def step():
    return torch.ones(10 * 2**20).exp().sum()  # 40 MB: beyond what glibc may keep by default
for _ in range(20):  # it takes some until the heap has its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_if_freed_memory_is_kept_large_buffers_need_no_new_pages():
    import ratios

    def faults(env):
        ran = subprocess.run([sys.executable, "-c", FAULTS], env=os.environ | env, capture_output=True, check=True)
        return int(ran.stdout.split()[-1])

    assert 10 * faults(ratios.KEPT) < faults({})


TINY = {
    logits.against_recipes: {"shapes": ((3, 50),)},
    logits.against_logarithms: {"shapes": ((3, 50),)},
    logits.large: {"cases": ((3, 50, torch.float32), (3, 50, torch.bfloat16))},
    logits.error_in_bfloat16: {"tokens": 3, "vocab": 50},
    logits.moved: {"rows": 3, "vocab": 50},
    heads.against_products: {"tokens": 4, "vocab": 50, "width": 4, "teacher_width": 8},
    heads.lengths: {"lengths": (3, 6), "vocab": 50, "width": 4},
    heads.what_comes_with_it: {"tokens": 4, "vocab": 50, "width": 4, "teacher_width": 8},
    heads.teachers: {"tokens": 4, "vocab": 50, "width": 4},
    functions.dense: {"tokens": 3, "vocab": 50},
    functions.top_k: {"shapes": ((3, 50),), "k": 4},
    functions.vocabularies: {"tokens": 3, "vocab": 50, "more": 5},
    functions.features: {"rows": 4, "width": 8, "batch": 3, "side": 2},
    steps.small_batches: {"shapes": ((4, 5),)},
    steps.cache: {"rounds": 1},
    steps.features: {"blocks": 4, "widths": (8, 12), "batch": (2, 6), "vocab": 20},
}


def test_every_section_has_a_tiny_case():
    import ratios

    assert {section for section, _ in ratios.SECTIONS.values()} == {*TINY}


@pytest.mark.parametrize("section", TINY, ids=lambda section: f"{section.__module__}.{section.__name__}")
@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_every_section_gives_distinct_finite_rows(section, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # compiling takes seconds
    monkeypatch.setattr(measure, "engine", lambda compiled: None)
    monkeypatch.setattr(liger, "here", lambda: False)  # Liger takes seconds
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(heads, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(small, "seconds", partial(small.seconds, rounds=1))
    rows = list(section("fresh", **TINY[section]))
    assert rows
    assert all(math.isfinite(row.ratio) and row.ratio != 0 for row in rows)  # a measured overhead may be negative
    assert len({(row.what, row.conditions) for row in rows}) == len(rows)  # no two rows have the same label


def test_lazy_rows_in_bf16_are_left_out_only_where_the_cpu_does_not_multiply_bf16(monkeypatch):
    monkeypatch.setattr(measure, "engine", lambda compiled: None)
    monkeypatch.setattr(liger, "here", lambda: False)
    monkeypatch.setattr(measure, "SECONDS", 0.0)

    def rows(there):
        monkeypatch.setattr(heads, "multiplies_bf16", lambda: there)
        return [row.conditions for row in heads.against_products("kept", **TINY[heads.against_products])]

    with_bf16, without = rows(True), rows(False)
    assert [said for said in with_bf16 if "bf16" not in said] == without
    assert len(with_bf16) == 2 * len(without)


def test_recipes_have_the_values_of_our_losses():
    """So the timed pairs compute the same thing."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 30, dtype=torch.float64, generator=generator)
    labels = torch.arange(5)
    for ours, recipe in (*logits.PAIRS.values(), *logits.BY_LOGARITHMS.values()):
        assert_same(ours, recipe, student, teacher, labels)
    wide = torch.cat([teacher, teacher[:, :4]], -1)
    assert_same(kdloss.VanillaKD(2.0, 0.5, vocabulary=kdloss.truncate), recipes.truncated, student, wide, labels)
    ids = torch.arange(20), torch.arange(20).flip(0)
    mapped = kdloss.VanillaKD(2.0, 0.5, vocabulary=kdloss.TokenMap(*ids))
    assert_same(mapped, lambda *inputs: recipes.mapped(*inputs, *ids), student, teacher, labels)
    top_k = kdloss.TopKLogits.of(teacher, 4)
    torch.testing.assert_close(
        recipes.gathered(student, top_k.indices, top_k.log_probs),
        recipes.sparse(student, top_k.indices, top_k.log_probs),
    )


def assert_same(ours, recipe, student, teacher, labels):
    student = student.clone().requires_grad_()
    values = [loss(student, teacher, labels) for loss in (ours, recipe)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))


SMALL = {"tokens": 3, "vocab": 50, "width": 4, "teacher_width": 8, "k": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gpu_table_can_be_made_on_a_cpu(dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(gpu, "engine", lambda compiled: None)
    monkeypatch.setattr(gpu, "peak", lambda step: step() or 2**20)  # it is tested above
    monkeypatch.setattr(liger, "here", lambda: False)
    rows = list(gpu.table("cpu", dtype, SMALL, rounds=1))
    assert len(rows) == len(set(rows)) == 8 * 4  # eight losses, four implementations
    assert not any("out of memory" in row for row in rows)


class Event:
    """A CUDA event that is one millisecond away from every other event."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def test_an_implementation_that_runs_out_of_gpu_memory_has_a_row_and_the_others_are_measured(monkeypatch):
    def too_much():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "cases", lambda *_: iter([("KL", {"ours": lambda: None, "plain": too_much})]))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    numbers = {"memory_allocated": 2**20, "max_memory_allocated": 3 * 2**20}
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", *numbers):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: numbers.get(name))
    rows = list(gpu.table("a card", torch.float32, SMALL, rounds=1))
    assert rows == ["| KL, fp32 | ours | 1 | 2 |", "| KL, fp32 | plain | out of memory | |"]


def test_without_a_gpu_make_gpu_prints_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert capsys.readouterr().out.count("\n") == 1
