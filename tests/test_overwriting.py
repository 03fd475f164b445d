"""A criterion may write the gradient over the logits, if the caller allows it."""

import numpy as np
import pytest
import torch
from engine_inputs import LABELS, close, exact, inputs, sides

import kdloss
from kdloss import LazyLogits, Mixture, VanillaKD


@pytest.mark.parametrize("labels", [LABELS, LABELS.clamp_min(0)], ids=["some ignored", "none ignored"])
def test_overwritten_logits_hold_their_gradient_and_exact_zeros_at_ignored_positions(labels, block_sizes):
    x = inputs()
    expected = exact("forward_kl", x, 2.0, 0.4, labels, labels != -100)
    criterion = VanillaKD(2.0, 0.4, overwrite_logits=True)
    logits, teacher = sides("dense", x)
    logits = logits * 1  # not a view: an overwritten view loses its autograd history
    before, target = logits.detach().clone(), teacher.clone()
    loss = criterion(logits, teacher, labels)
    np.testing.assert_allclose(loss.item(), expected[0], rtol=1e-12)
    slopes = torch.autograd.grad(loss, [logits, *x.student])
    for ours, slope in zip(slopes[1:], expected[1], strict=True):
        close(ours, slope, 1e-10)
    assert torch.equal(logits, slopes[0])
    assert not torch.equal(logits, before)
    assert not logits[labels == -100].any()
    assert torch.equal(teacher, target)
    leaf = before.clone().requires_grad_()
    criterion(leaf, teacher, labels).backward()
    torch.testing.assert_close(leaf.grad, slopes[0], rtol=0, atol=1e-14)


def test_logits_are_overwritten_only_on_request_and_only_if_a_gradient_is_needed(block_sizes):
    x = inputs()
    for criterion in (VanillaKD(2.0, 0.4), VanillaKD(2.0, 0.4, overwrite_logits=True)):
        student, teacher = (t.detach() for t in sides("dense", x))
        before = student.clone(), teacher.clone()
        criterion(student, teacher, LABELS)
        with torch.no_grad():
            criterion(student.requires_grad_(), teacher, LABELS)
        assert torch.equal(student, before[0])
    student = before[0].clone().requires_grad_()
    VanillaKD(2.0, 0.4)(student, teacher, LABELS).backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_a_second_backward_or_derivative_of_overwritten_logits_raises_an_error():
    criterion = VanillaKD(overwrite_logits=True)
    student, teacher = (t.detach() for t in sides("dense", inputs()))
    student.requires_grad_()
    loss = criterion(student, teacher, LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"overwritten.*write overwrite_logits=False"):
        loss.backward()
    student = student.detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative; write overwrite_logits=False"):
        torch.autograd.grad(criterion(student, teacher, LABELS), student, create_graph=True)


LATER = {
    "the same logits": lambda z, other: (z, other),
    "a view": lambda z, other: (z[:, :-1], other[:, :-1]),
    "the later rows": lambda z, other: (z[1:], other[1:]),
    "detached, as a teacher": lambda z, other: (other, z.detach()),
    "in a mixture": lambda z, other: (other, Mixture([other, z])),
}


@pytest.mark.parametrize("sides_of", LATER.values(), ids=LATER)
@pytest.mark.parametrize("after_backward", [False, True])
def test_logits_that_were_overwritten_are_refused_as_logits_until_they_are_written_again(sides_of, after_backward):
    student, teacher = (t.detach() for t in sides("dense", inputs()))
    logits = student.clone().requires_grad_() * 1
    loss = VanillaKD(overwrite_logits=True)(logits, teacher, LABELS)
    if after_backward:
        loss.backward()
    pair = sides_of(logits, teacher)
    dist = kdloss.divergences.dist
    for use in (
        VanillaKD(alpha=0.0),
        VanillaKD(alpha=0.0, overwrite_logits=True),
        VanillaKD(alpha=0.0, divergence=dist),  # which is computed outside the sweep
        kdloss.divergences.forward_kl,
        dist,
    ):
        with pytest.raises(RuntimeError, match=r"(student|teacher)'s logits were overwritten.*overwrite_logits=False"):
            use(*pair)
    logits.detach().copy_(student)
    fresh = sides_of(student, teacher)
    torch.testing.assert_close(VanillaKD(alpha=0.0)(*pair), VanillaKD(alpha=0.0)(*fresh), rtol=0, atol=1e-14)


def test_after_logits_were_overwritten_others_are_transformed_and_compiled_as_before():
    student, teacher = (t.detach() for t in sides("dense", inputs()))
    VanillaKD(overwrite_logits=True)(student.clone().requires_grad_(), teacher, LABELS)
    criterion = VanillaKD(alpha=0.0)

    def loss(z):
        return criterion(z, teacher) + kdloss.divergences.adaptive_kl(z, teacher).sum()

    z = student.clone().requires_grad_()
    expected = torch.autograd.grad(loss(z), z)[0]
    torch.testing.assert_close(torch.func.grad(loss)(student), expected)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(student), loss(student))


def test_logits_of_an_output_are_refused_once_they_were_overwritten():
    class Out:
        logits = sides("dense", inputs())[0]

    teacher, criterion = torch.randn(2, 7, 11).double(), VanillaKD(causal=True, overwrite_logits=True)
    criterion(Out(), teacher, LABELS)
    with pytest.raises(RuntimeError, match="student's logits were overwritten"):
        criterion(Out(), teacher, LABELS)


@pytest.mark.parametrize(
    "places", [(0, 1), ((0, ..., slice(4)), (0, ..., slice(4, 8)))], ids=["one behind the other", "side by side"]
)
@pytest.mark.parametrize("first", [0, 1])
def test_overwriting_the_logits_of_one_head_leaves_those_of_the_other(places, first):
    heads = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) * 1
    one, other = heads[places[first]], heads[places[1 - first]]
    teacher, before = torch.randn(one.shape).double(), other.detach().clone()
    VanillaKD(alpha=0.0, overwrite_logits=True)(one, teacher)
    torch.testing.assert_close(VanillaKD(alpha=0.0)(other, teacher), VanillaKD(alpha=0.0)(before, teacher))


def test_overwriting_logits_that_another_operation_saved_raises_an_error_in_backward():
    x = inputs()
    student = LazyLogits(*x.student).dense().tanh()  # tanh saves its output for its gradient
    loss = VanillaKD(overwrite_logits=True)(student, LazyLogits(*x.teacher).dense(), LABELS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
