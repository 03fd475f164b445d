"""Laws that hold for every exported loss; a new loss enters by being exported."""

import pytest
import torch

import kdloss
from kdloss import divergences

DIVERGENCES = [getattr(divergences, name) for name in divergences.__all__]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_and_its_gradient_are_exactly_zero_at_the_teacher(divergence):
    teacher = torch.randn(4, 7)
    student = teacher.clone().requires_grad_()
    value = divergence(student, teacher, temperature=2.0)
    value.sum().backward()
    assert value.tolist() == [0.0] * 4
    assert not student.grad.any()


def test_the_public_names_exist():
    assert all(hasattr(kdloss, name) for name in kdloss.__all__)
