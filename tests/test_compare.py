"""applications/compare.py at a small size: equal conditions, the cells of a grid, and resuming a killed study."""

import importlib
import json

import compare
import distill_lm
import pytest
import results
import tiny
import torch


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """Run all methods at a small size; return arguments, results and the output folder."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs")
    arguments = tiny.flags(data, output)
    return arguments, compare.main([*arguments, "--seeds", "0", "1"]), output


def test_all_methods_start_from_the_same_student_and_learn(study):
    _, runs, _ = study
    assert list(runs) == ["teacher", *compare.METHODS]
    for seed in (0, 1):
        found = [runs[method][seed] for method in compare.METHODS]
        (start,) = {result["curve"][0]["perplexity"] for result in found}
        assert all(result["perplexity"] < 0.8 * start for result in found)
        assert len({result["perplexity"] for result in found}) == len(found)  # no two methods give the same result
    assert runs["none"][0]["curve"][0] != runs["none"][1]["curve"][0]  # two seeds give two students


def test_training_without_distillation_gets_the_operations_of_the_most_expensive_distilled_student(study):
    _, runs, _ = study
    for plain, longer, *distilled in zip(
        *(runs[m] for m in ("none", "none-same-compute", "vanilla", "feature", "both")), strict=True
    ):
        assert all(student["teraflop"] > plain["teraflop"] for student in distilled)  # by the teacher's passes
        most_expensive = max(student["teraflop"] for student in distilled)
        assert longer["teraflop"] == pytest.approx(most_expensive, abs=plain["teraflop"] / plain["steps"])
    assert len({longer["steps"] for longer in runs["none-same-compute"]}) == 1


def test_a_slow_machine_changes_only_the_measured_times(study, tmp_path, monkeypatch):
    arguments, runs, output = study
    now, ends = [0.0], []
    schedule = distill_lm.get_linear_schedule_with_warmup

    def clock(device):
        now[0] += 1 + now[0] / 100  # every step takes longer than the one before
        return now[0]

    def recorded(optimizer, warmup, steps):
        ends.append(steps)
        return schedule(optimizer, warmup, steps)

    monkeypatch.setattr(distill_lm.evaluation, "clock", clock)
    monkeypatch.setattr(distill_lm, "get_linear_schedule_with_warmup", recorded)
    options = ["--teachers", str(output / "teachers"), "--output", str(tmp_path)]
    slow = compare.main([*arguments, "--seeds", "0", "1", *options])
    timed = ("seconds", "tokens_per_second", "student", "curve")
    for row, seeds in runs.items():
        for result, expected in zip(slow[row], seeds, strict=True):
            assert {k: x for k, x in result.items() if not k.endswith(timed)} == {
                k: x for k, x in expected.items() if not k.endswith(timed)
            }
    of_each_seed = [runs[method][0]["steps"] for method in compare.METHODS]
    assert ends == 2 * of_each_seed  # the learning rate reaches 0 at the end of each run


def test_means_and_deviations_are_over_the_seeds(study):
    _, runs, output = study
    first, second = (found["perplexity"] for found in runs["vanilla"])
    summary = json.loads((output / "results.json").read_text())["summary"]["vanilla"]["perplexity"]
    assert summary["mean"] == pytest.approx((first + second) / 2)
    assert summary["deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    assert f"{summary['mean']:.1f} ± {summary['deviation']:.1f}" in (output / "results.md").read_text()
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_study_repeats_no_finished_cell(study, tmp_path, monkeypatch):
    arguments, runs, output = study
    cells = sorted((output / "cells").glob("*.json"))
    (tmp_path / "cells").mkdir()
    kept = [cell for cell in cells if not cell.name.startswith("feature")]
    for cell in kept:
        (tmp_path / "cells" / cell.name).write_bytes(cell.read_bytes())
    trained, fit = [], distill_lm.fit
    monkeypatch.setattr(distill_lm, "fit", lambda *a: trained.append(a[-1]) or fit(*a))
    again = compare.main([*arguments, "--seeds", "0", "1", "--output", str(tmp_path)])
    assert trained == ["feature (0)", "feature (1)"]
    assert all((tmp_path / "cells" / cell.name).read_bytes() == cell.read_bytes() for cell in kept)
    for row in runs:
        assert [x["perplexity"] for x in again[row]] == [x["perplexity"] for x in runs[row]]


def test_a_grid_has_every_pair_of_values_and_trains_nothing_twice(data, study, tmp_path, monkeypatch):
    asked = []

    def fit(distill, student, args, setup, checkpoints, students, title):
        asked.append((args.method, args.temperature, args.alpha))
        return {"perplexity": 2.0, "parameters": 1, "seed": args.seed, "steps": 1, "seconds": 1.0, "teraflop": 1.0,
                "curve": [{"step": 1, "seconds": 1.0, "perplexity": 2.0}]}  # fmt: skip

    monkeypatch.setattr(distill_lm, "fit", fit)
    grid = "--methods none vanilla feature --vary temperature 1 2 --vary alpha 0.1 0.5"
    runs = compare.main([*study[0], *grid.split(), "--output", str(tmp_path)])
    pairs = [(1.0, 0.1), (1.0, 0.5), (2.0, 0.1), (2.0, 0.5)]
    assert [x[1:] for x in asked if x[0] == "vanilla"] == pairs
    assert [x[0] for x in asked].count("none") == 1  # it has neither temperature nor alpha
    assert [x[2] for x in asked if x[0] == "feature"] == [0.1, 0.5]  # it has no temperature
    assert list(runs)[2:5] == [
        "vanilla, temperature 1, alpha 0.1",
        "feature, alpha 0.1",
        "vanilla, temperature 1, alpha 0.5",
    ]


def test_one_by_one_changes_one_flag_at_a_time():
    flags = "--one-by-one --vary alpha 0 1 --vary layers last 0,-1"
    args = compare.options.read(compare.DEFAULTS, flags.split(), None)
    single = [{"alpha": "0"}, {"alpha": "1"}, {"layers": "last"}, {"layers": "0,-1"}]
    assert list(compare.changes(args)) == [{}, *single]


def test_training_at_the_same_compute_needs_a_distilled_student_for_comparison(study):
    with pytest.raises(ValueError, match="'none-same-compute' needs 'none' and a method that distils"):
        compare.main([*study[0], "--methods", "none-same-compute"])


@pytest.mark.parametrize(("vary", "message"), [("alpha 0.1 1.5", "alpha"), ("layers last lats", "lats")])
def test_an_invalid_value_is_refused_before_the_first_cell(study, monkeypatch, vary, message):
    monkeypatch.setattr(distill_lm, "prepare", None)
    with pytest.raises(ValueError, match=message):
        compare.main([*study[0], "--vary", *vary.split()])


@pytest.mark.parametrize("study", results.STUDIES)
def test_every_study_of_make_results_can_be_planned(study):
    args = compare.options.read(compare.DEFAULTS, results.STUDIES[study].split(), None)
    rows = {cell.row for cell in compare.plan(args)}
    assert len(rows) == len(compare.plan(args)) >= len(args.methods)


@pytest.mark.parametrize("name", [name for name, flags in results.EXAMPLES.items() if flags])
def test_the_flags_of_the_examples_in_make_results_can_be_parsed(name):
    defaults = importlib.import_module(name.partition("-")[0]).DEFAULTS
    args = compare.options.read(defaults, results.EXAMPLES[name].split(), None)
    assert args.seeds == [0, 1, 2]
