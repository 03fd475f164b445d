"""The pictures of docs/results.md show the measured rows in the right places."""

import json

import pytest
import questions


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Write made-up results of a study: for each row, the perplexity of each seed and further numbers."""
    monkeypatch.setattr(questions, "RUNS", tmp_path)
    monkeypatch.setattr(questions, "PICTURES", tmp_path)

    def write(name, rows, **further):
        runs = {row: [{"perplexity": p, **further.get(row, {})} for p in seeds] for row, seeds in rows.items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"runs": runs}))

    return write


def drawn(axes):
    """The points of each line by the label of the line."""
    names = [text.get_text() for text in axes.texts]
    return dict(zip(names, [container[0].get_xydata().tolist() for container in axes.containers], strict=False))


def test_a_temperature_is_drawn_in_percent_of_the_undistilled_student_of_the_same_seed(study):
    rows = {"none": [100, 200], "vanilla": [50, 120], "vanilla, temperature 4": [70, 140], "vanilla, alpha 0.5": [1, 1]}
    for name in ("output", "gap", "unlike"):
        study(name, rows)
    assert drawn(questions.temperature().axes[0])["2.5 times smaller"] == [[1, 55], [4, 70]]


def test_the_size_is_the_compression_of_its_row(study):
    rows = {"teacher": [10], "none": [90, 90], "vanilla": [60, 60], "none, student-width 16": [200, 200]}
    rows |= {"vanilla, student-width 16": [120, 120]}
    sizes = {row: {"compression": 20.0 if "16" in row else 2.0} for row in rows}
    study("size", rows, **sizes)
    assert drawn(questions.size().axes[0]) == {"alone": [[2, 90], [20, 200]], "distilled": [[2, 60], [20, 120]]}


def test_each_bar_has_the_name_of_its_row_and_the_teacher_is_a_line(study):
    study("demo", {"teacher": [7], "none": [5], "none-same-compute": [4], "feature": [3], "vanilla": [2], "both": [1]})
    axes = questions.kinds().axes[0]
    bars = dict(
        zip([t.get_text() for t in axes.get_yticklabels()], [bar.get_width() for bar in axes.patches], strict=True)
    )
    assert bars == {"alone": 5, "alone, as many operations": 4, "features": 3, "logits": 2, "both": 1}
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [7]


def test_divergences_are_drawn_for_one_alpha_with_perplexities_of_samples(study):
    rows = {
        "teacher": [2],
        "none": [9],
        "vanilla, divergence forward_kl, alpha 0": [4],
        "vanilla, divergence jsd, alpha 0": [5],
    }
    rows |= {"vanilla, divergence jsd, alpha 0.1": [7]}
    further = {row: {"samples": 10 * p[0], "own": 100 * p[0]} for row, p in rows.items()}
    study("divergences", rows, **further)
    for axes, times in zip(questions.divergences().axes, (1, 10, 100), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [5 * times, 4 * times, 9 * times]  # from the bottom up
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [2 * times]
    names = [text.get_text() for text in questions.divergences().axes[0].get_yticklabels()]
    assert names == ["jsd", "forward_kl", "alone"]


def test_layers_pairing_and_distance_are_drawn_side_by_side_with_the_default_first(study):
    rows = {
        "none": [9],
        "feature": [5],
        "feature, layers last": [4],
        "feature, pairing same": [6],
        "feature, alpha 0.1": [1],
    }
    study("features", rows | {"feature, distance mse": [7]})
    drawn = {}
    for axes in questions.layers().axes:
        names = [text.get_text() for text in axes.get_yticklabels()]
        drawn[axes.get_title(loc="left")] = dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [9]
    assert drawn["layers"] == {"last": 4, "auto": 5}
    assert drawn["pairing"] == {"same": 6, "uniform": 5}
    assert drawn["distance"] == {"mse": 7, "layer_norm_mse": 5}


def test_what_was_not_measured_is_not_drawn(study):
    assert not any(map(questions.measured, questions.QUESTIONS))
    study("weak-teacher", {"none": [2], "vanilla": [3]})
    study("output", {"none": [2], "vanilla": [1]})
    assert [name for name in questions.QUESTIONS if questions.measured(name)] == ["alpha"]
    questions.main(["alpha"])
    assert (questions.PICTURES / "question-alpha.png").read_bytes().startswith(b"\x89PNG")
