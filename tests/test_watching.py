"""The watchers see what they are there for, and a training step of the engine waits for no accelerator."""

import measure
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moved import bytes_moved
from torch import nn
from versions import since_torch
from watching import Waited, as_on_an_accelerator, may_wait, never_waiting

import kdloss
from kdloss import LazyLogits, Mixture, TokenMap, TopKLogits, VanillaKD, divergences

X = torch.arange(6.0)
MASK = X > 2
OFFENDERS = {
    "nonzero": lambda x: (x > 2).nonzero(),
    "where": lambda x: torch.where(x > 2),
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "a mask as index": lambda x: x[x > 2],
    "assignment by a mask": lambda x: x.clone().__setitem__(x > 2, x[:3]),
    "a list as index": lambda x: x[[0, 2]],
    "an array as index": lambda x: x[np.array([0, 2])],
    "masked_select": lambda x: x.masked_select(x > 2),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "tensor": lambda x: x * torch.tensor([1.0] * 6),
    "as_tensor": lambda x: x * torch.as_tensor(2.0),
    "new_tensor": lambda x: x.new_tensor([2.0]),
    "to another device": lambda x: x.to("meta"),
    "copied to another device": lambda x: torch.empty(6, device="meta").copy_(x),
    "the gradient of masked_scatter": lambda x: (
        torch.zeros(6).masked_scatter(MASK, x.clone().requires_grad_()).sum().backward()
    ),
}
HARMLESS = {
    "arithmetic": lambda x: F.cross_entropy(x.view(2, 3), x[:2].long()),
    "filled by a mask": lambda x: x.clone().__setitem__(x > 2, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 2, 0),
    "full": lambda x: torch.full((2,), 3.0) + torch.zeros(2).fill_(1),
    "an index of numbers": lambda x: x[torch.arange(2)],
    "a slice": lambda x: x[1:, None],
    "repeats whose sum is said": lambda x: x.repeat_interleave(torch.ones(6).long(), output_size=6),
    "to another device without waiting": lambda x: x.to("meta", non_blocking=True),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "as_tensor of a tensor": lambda x: torch.as_tensor(x),
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_what_would_wait_is_refused(name):
    with pytest.raises(Waited), never_waiting():
        OFFENDERS[name](X)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_would_not_wait_is_not(name):
    with never_waiting():
        HARMLESS[name](X)


def test_inside_of_an_autograd_function_and_of_backward_it_is_refused_too():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, where):
            ctx.where = where
            return x * (2 if where == "backward" else x.sum().item())

        @staticmethod
        def backward(ctx, upstream):
            return upstream * upstream.sum().item(), None

    for where in ("forward", "backward"):
        x = torch.ones(3, requires_grad=True)
        with pytest.raises(Waited), never_waiting():
            Function.apply(x, where).sum().backward()


def count(x):
    return int(x.sum())


def test_one_function_may_read_what_was_copied_for_it(monkeypatch):
    with pytest.raises(Waited), never_waiting():
        count(X)
    may_wait(monkeypatch, f"{__name__}.count")
    with never_waiting():
        assert count(X) == 15


# -- the engine --


def given(dtype=torch.float32):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4).to(dtype), torch.randn(2, 6, 4).to(dtype)
    heads = [torch.randn(11, 4).to(dtype) for _ in range(2)]
    labels = torch.randint(11, (2, 6))
    labels[0, :2] = -100
    return LazyLogits(student.requires_grad_(), heads[0].requires_grad_()), LazyLogits(teacher, heads[1]), labels


SHARED = TokenMap(torch.arange(9), torch.arange(1, 10))
REVERSE = kdloss.Logits(divergences.reverse_kl, name="second")
STEPS = {  # the criterion, whether student and teacher give logits, and what else becomes of the teacher
    "logits": (VanillaKD(), True, None),
    "causal logits": (VanillaKD(causal=True), True, None),
    "JSD": (VanillaKD(divergence=divergences.jsd), True, None),
    "top-k": (VanillaKD(1.0), True, lambda t: TopKLogits.of(t, 3)),
    "lazy": (VanillaKD(), False, None),
    "mixture": (VanillaKD(), False, lambda t: Mixture([t, t])),
    "token map": (VanillaKD(vocabulary=SHARED), False, None),
    "two terms": (VanillaKD() + 0.5 * REVERSE, False, None),
    "values": (VanillaKD(reduction="none"), False, None),
}
WAITS = pytest.mark.xfail(strict=True, raises=Waited, reason="positions that count are found by nonzero(), which waits")


@WAITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_no_accelerator(name, dtype, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    criterion, dense, of_teacher = STEPS[name]
    student, teacher, labels = given(dtype)
    teacher = teacher.dense() if dense else teacher
    teacher = teacher if of_teacher is None else of_teacher(teacher)

    def step():
        criterion(student.dense() if dense else student, teacher, labels).sum().backward()

    step()  # the first one may look at its inputs
    with never_waiting():
        step()


@WAITS
def test_a_step_of_models_waits_for_no_accelerator(monkeypatch):
    """Plain ones: what transformers' models look at in their masks is theirs."""
    as_on_an_accelerator(monkeypatch)
    teacher, student = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 5)) for n in (8, 6))
    distill = kdloss.Distiller(teacher, VanillaKD())
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, -100, 4, 0])

    def step():
        distill(student, x, labels=labels).loss.backward()

    step()
    with never_waiting():
        step()


# -- bytes --


def moved(step, size):
    return bytes_moved(step, size) / size


@since_torch(2, 10)
def test_bytes_moved_are_what_operators_read_and_write():
    x, y, out = torch.randn(3, 64, 100)
    size = x.numel()
    assert moved(lambda: x + y, size) == 12
    assert moved(lambda: x.mul_(2), size) == 8
    assert moved(lambda: torch.add(x, y, out=out), size) == 12  # what stood in `out` isn't read
    assert moved(lambda: out.copy_(x), size) == 8
    assert moved(lambda: x.bfloat16(), size) == 6
    assert moved(lambda: x.sum(), size) == pytest.approx(4, abs=0.01)
    assert moved(lambda: x + y[:1].expand(64, 100), size) == pytest.approx(8, abs=0.1)
    assert moved(lambda: x.view(100, 64).T[1:], size) == 0
    assert moved(lambda: torch.empty(64, 100), size) == 0
    assert moved(lambda: x.scatter_add_(-1, torch.zeros(64, 1).long(), torch.ones(64, 1)), size) < 0.5
    assert moved(lambda: x[:1] + 1, size) == 0  # too small to count


@since_torch(2, 10)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_of_compiled_functions_the_compiler_reports_inputs_and_outputs():
    x, y = torch.randn(2, 16, 2000)
    several = torch.compile(lambda a, b: (a + 2 * b).softmax(-1))
    assert moved(lambda: several(x, y) + 1, x.numel()) == 12 + 8  # one operator outside
    assert x.nbytes <= measure.peak(lambda: several(x, y)) < 1.01 * x.nbytes
