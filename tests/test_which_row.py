"""Distances are told which class and which example their rows are of."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kdloss
from kdloss import Features


class Told:
    """A distance that keeps what it is told."""

    def __init__(self):
        self.labels = self.index = None

    def __call__(self, student, teacher, *, mask=None, labels=None, index=None):
        self.labels, self.index = labels, index
        return (student - teacher).square().mean(-1)


def told(shape, labels=None, index=None, **settings):
    distance = Told()
    both = [SimpleNamespace(hidden_states=[torch.randn(*shape)] * 2) for _ in range(2)]
    criterion = kdloss.Sum(
        Features("last", distance=distance, **settings), causal=len(shape) == 3 and labels is not None
    )
    criterion(*both, labels, index=index)
    return distance


def test_examples_come_with_their_class_and_index():
    seen = told((3, 4), torch.tensor([2, -100, 1]), torch.tensor([7, 8, 9]))
    assert seen.labels[[0, 2]].tolist() == [2, 1]
    assert seen.index.tolist() == [7, 8, 9]


def test_positions_come_with_the_label_they_are_held_against_and_the_index_of_their_example():
    seen = told((2, 3, 4), torch.tensor([[5, 6, 7], [1, 2, 3]]), torch.tensor([8, 9]))
    assert seen.labels.tolist() == [[6, 7], [2, 3]]
    assert seen.index.tolist() == [[8, 8], [9, 9]]


def test_a_maps_pixels_come_with_the_class_of_their_image():
    distance = Told()
    maps = [torch.randn(2, 4, 2, 3) for _ in range(2)]
    both = [SimpleNamespace(hidden_states=[x, x]) for x in maps]
    kdloss.Sum(Features("last", distance=distance))(*both, torch.tensor([3, 1]), index=torch.tensor([8, 9]))
    assert distance.labels.tolist() == [[3] * 6, [1] * 6]
    assert distance.index.tolist() == [[8] * 6, [9] * 6]


def test_without_labels_or_where_they_do_not_count_there_is_no_class():
    assert told((3, 4)).labels is None
    assert told((3, 4), torch.tensor([2, -100, 1]), positions="mask").labels is None
    assert told((3, 4), torch.rand(3, 5)).labels is None, "soft labels are no classes"


@pytest.mark.parametrize("wrong", [torch.tensor([1]), torch.rand(3), torch.zeros(3, 4, dtype=torch.int64)])
def test_an_index_that_is_none_of_each_example_is_refused(wrong):
    with pytest.raises(ValueError, match="index is an integer for each of the 3 examples"):
        told((3, 4), index=wrong)


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, width), torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "known", [{"labels": torch.tensor([0, 1])}, {"index": torch.tensor([5, 6])}], ids=["labels", "index"]
)
def test_in_a_distillation_crd_holds_no_row_against_itself_when_it_comes_again(known):
    crd = partial(kdloss.distances.CRD, width=4, negatives=2, temperature=0.1)
    model = kdloss.Distillation(Net(5), Net(6), Features(["body"], pairing="same", distance=crd))
    model.prepare(torch.randn(2, 4))
    x = torch.randn(2, 4)
    model(x, **known)
    heads = model.criterion.terms["feature"].distances["body"]
    with torch.no_grad():
        s = F.normalize(heads.student(model.student.body(x)), dim=-1)
        t = F.normalize(heads.teacher(model.teachers[0].module.body(x)), dim=-1)

    def odds(a, b):
        return ((a * b).sum(-1) / 0.1 - math.log(2) - 1 / (2 * 4 * 0.01)).exp()

    own = 2 * (1 + 1 / odds(s, t)).log()
    other = (1 + odds(s, t.flip(0))).log() + (1 + odds(t, s.flip(0))).log()  # the memory holds these two rows
    torch.testing.assert_close(model(x, **known).loss.detach(), (own + other).mean())
