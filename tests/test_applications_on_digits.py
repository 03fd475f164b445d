"""applications/changing_teachers.py on handwritten digits."""

import changing_teachers as application
import numpy as np
import pytest
import torch


def test_the_application_measures_every_method_and_a_student_without_a_teacher_and_resumes(
    tmp_path, monkeypatch, capsys
):
    small = ["--steps=3", "--width=4", "--assistant-width=5", "--teacher-width=6", f"--output={tmp_path}"]
    results = application.main([*small, "--seeds", "0", "1"])
    assert list(results) == [
        "alone", "alone, labels smoothed",
        "large teacher", "by the large teacher", "its assistant", "by the assistant",
        "generation 1", "generation 2", "generation 3", "by its moving average", "the moving average",
        "by each other", "by the average of 3",
    ]  # fmt: skip
    assert all(len(seeds) == 2 and 0 < error < 100 for seeds in results.values() for error, _ in seeds)
    assert [seeds[0][1] for seeds in results.values()] == [1, 1, 1, 2, 2, 3, 2, 3, 4, 1, 1, 2, 3]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert set(lines[1]) == {"|", "-"}
    alone, other = ([error for error, _ in results[row]] for row in ("alone", "by each other"))
    differences = np.subtract(other, alone)
    cells = [cell.strip() for cell in lines[13].split("|")[1:-1]]
    mean, deviation = np.mean(other), np.std(other, ddof=1)
    difference = f"{np.mean(differences):+.1f} ± {np.std(differences, ddof=1):.1f}"
    assert cells == ["by each other", f"{mean:.1f} ± {deviation:.1f}", difference, "2"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(application.Digits, "fit", lambda *_: pytest.fail("this was done before"))
    assert application.main([*small, "--seeds", "1", "0"])["alone"] == results["alone"][::-1]


def test_all_students_of_one_seed_see_the_same_images_and_start_from_the_same_weights():
    digits, again, other = (application.Digits(application.Settings(steps=2), seed) for seed in (0, 0, 1))
    assert len(digits.x) == 300
    assert len(digits.x) + len(digits.test_x) == 1797
    for (x, y), (same, labels), (others, _) in zip(digits.batches(), again.batches(), other.batches(), strict=True):
        assert torch.equal(x, same)
        assert torch.equal(y, labels)
        assert not torch.equal(x, others)
    first, twin = digits.model(), again.model()
    assert torch.equal(first[0].weight, twin[0].weight)
    for different in (digits.model(start=1), other.model()):
        assert not torch.equal(first[0].weight, different[0].weight)


def test_every_kind_of_student_learns():
    kinds = [application.by_nobody, application.by_large_teacher, application.by_generations, application.by_average]
    kinds += [application.by_each_other, application.by_ensemble]
    settings = application.Settings(steps=60, width=32, teacher_width=64, generations=2, decay=0.8)
    digits = application.Digits(settings, seed=0)
    errors = {row: error for kind in kinds for row, (error, _) in kind(digits).items()}
    assert len(errors) == 12
    assert {row: error for row, error in errors.items() if error > 40} == {}  # chance would be 90
