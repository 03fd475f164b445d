"""Distances receive the class and the index of the example of each of their rows."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kdloss
from kdloss import Features


class Recorder:
    """A distance that stores the labels and the index that it receives."""

    def __init__(self):
        self.labels = self.index = None

    def __call__(self, student, teacher, *, mask=None, labels=None, index=None):
        self.labels, self.index = labels, index
        return (student - teacher).square().mean(-1)


def received(shape, labels=None, index=None, **settings):
    distance = Recorder()
    both = [SimpleNamespace(hidden_states=[torch.randn(*shape)] * 2) for _ in range(2)]
    criterion = kdloss.Sum(
        Features("last", distance=distance, **settings), causal=len(shape) == 3 and labels is not None
    )
    criterion(*both, labels, index=index)
    return distance


def test_a_distance_receives_the_class_and_index_of_each_example():
    distance = received((3, 4), torch.tensor([2, -100, 1]), torch.tensor([7, 8, 9]))
    assert distance.labels[[0, 2]].tolist() == [2, 1]
    assert distance.index.tolist() == [7, 8, 9]


def test_a_distance_receives_for_each_position_the_label_it_predicts_and_the_index_of_its_example():
    distance = received((2, 3, 4), torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.tensor([8, 9]))
    assert distance.labels.tolist() == [[6, 7], [2, 3]]
    assert distance.index.tolist() == [[8, 8], [9, 9]]


def test_a_distance_receives_for_each_pixel_the_class_and_index_of_its_image():
    distance = Recorder()
    maps = [torch.randn(2, 4, 2, 3) for _ in range(2)]
    both = [SimpleNamespace(hidden_states=[x, x]) for x in maps]
    kdloss.Sum(Features("last", distance=distance))(*both, torch.tensor([3, 1]), index=torch.tensor([8, 9]))
    assert distance.labels.tolist() == [[3] * 6, [1] * 6]
    assert distance.index.tolist() == [[8] * 6, [9] * 6]


def test_without_class_labels_that_count_a_distance_receives_no_labels():
    assert received((3, 4)).labels is None
    assert received((3, 4), torch.tensor([2, -100, 1]), positions="mask").labels is None
    assert received((3, 4), torch.rand(3, 5)).labels is None, "soft labels are no classes"


@pytest.mark.parametrize("wrong", [torch.tensor([1]), torch.rand(3), torch.zeros(3, 4, dtype=torch.int64)])
def test_an_index_that_is_not_one_integer_per_example_is_refused(wrong):
    with pytest.raises(ValueError, match="index is an integer for each of the 3 examples"):
        received((3, 4), index=wrong)


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "identity", [{"labels": torch.tensor([0, 1])}, {"index": torch.tensor([5, 6])}], ids=["labels", "index"]
)
def test_in_a_distillation_crd_does_not_contrast_an_example_with_its_stored_features(identity):
    crd = partial(kdloss.distances.CRD, width=4, negatives=2, temperature=0.1)
    model = kdloss.Distillation(Net(5), Net(6), Features(["body"], pairing="same", distance=crd))
    model.prepare(torch.randn(2, 4))
    x = torch.randn(2, 4)
    model(x, **identity)
    heads = model.criterion.terms["feature"].distances["body"]
    with torch.no_grad():
        s = F.normalize(heads.student(model.student.body(x)), dim=-1)
        t = F.normalize(heads.teacher(model.teachers[0].module.body(x)), dim=-1)

    def odds(a, b):
        return ((a * b).sum(-1) / 0.1 - math.log(2) - 1 / (2 * 4 * 0.01)).exp()

    positive = 2 * (1 + 1 / odds(s, t)).log()
    negative = (1 + odds(s, t.flip(0))).log() + (1 + odds(t, s.flip(0))).log()  # the memory stores these two examples
    torch.testing.assert_close(model(x, **identity).loss.detach(), (positive + negative).mean())
