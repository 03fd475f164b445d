"""On this device (tests/device.py), a step in every training dtype matches float64 on the CPU."""

import device
import pytest
import recipes
import torch
from versions import since_torch

from kdloss import Distiller, LazyLogits, VanillaKD, divergences

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of a gradient, relative to its norm
LOSSES = {
    "KL + CE": (VanillaKD(2.0, 0.5), recipes.kl_ce),
    "JSD": (VanillaKD(2.0, 0.0, divergence=divergences.jsd), recipes.jsd),
    "reverse KL": (VanillaKD(2.0, 0.0, divergence=divergences.reverse_kl), recipes.reverse_kl),
    "TVD": (VanillaKD(2.0, 0.0, divergence=divergences.total_variation), recipes.total_variation),
}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def labels_for(rows):
    labels = torch.randint(300, (rows,))
    labels[::3] = -100
    return labels


def assert_matches_float64(value, leaves, recipe, to_logits, teacher, labels, dtype, rounding=1):
    """`to_logits` computes logits from the leaves; the recipe gets only the positions that count."""
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    keep = (labels != -100).cpu()
    expected = recipe(to_logits(*exact)[keep], teacher.cpu()[keep], labels.cpu()[keep])
    assert value.device.type == torch.device(device.NAME).type
    assert value.item() == pytest.approx(expected.item(), rel=ROUNDING[dtype])
    gradients = torch.autograd.grad(value, leaves)
    for ours, expected_gradient in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.cpu().double() - expected_gradient).norm() <= rounding * ROUNDING[dtype] * expected_gradient.norm()


@every_dtype
@every_loss
def test_full_logits_match_float64(name, dtype):
    ours, recipe = LOSSES[name]
    student, teacher = (3 * torch.randn(2, 70, 300)).to(dtype)
    student, labels = student.clone().requires_grad_(), labels_for(70)
    value = ours(student, teacher, labels)
    assert_matches_float64(value, [student], recipe, lambda z: z, teacher.double(), labels, dtype)


@every_dtype
@every_loss
def test_hidden_states_and_heads_match_float64(name, dtype):
    ours, recipe = LOSSES[name]
    student, teacher = ([torch.randn(n, 16).to(dtype) for n in (70, 300)] for _ in range(2))
    leaves, labels = [(x / 2).requires_grad_() for x in student], labels_for(70)
    value = ours(LazyLogits(*leaves), LazyLogits(*teacher), labels)
    hidden, weight = (x.double() for x in teacher)
    rounding = 10 if name == "TVD" else 1  # its gradient jumps where rounded logits are equal
    assert_matches_float64(value, leaves, recipe, lambda h, w: h @ w.T, hidden @ weight.T, labels, dtype, rounding)


@pytest.mark.skipif(device.NAME != "cuda", reason="PyTorch reports synchronisations of CUDA only")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("models", [False, True])
def test_a_training_step_does_not_wait_for_the_device(models):
    student, teacher = (torch.nn.Linear(16, 300) for _ in range(2))
    x, criterion = torch.randn(70, 16), VanillaKD()
    distill = Distiller(teacher, criterion)

    def step(labels):
        loss = distill(student, x, labels=labels).loss if models else criterion(student(x), teacher(x).detach(), labels)
        loss.backward()

    batches = [labels_for(70) for _ in range(3)]
    batches[1][:9] = -100
    for labels in batches[:2]:
        step(labels)  # the first steps check what is compiled
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(batches[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@since_torch(2, 5)  # before, torch doesn't know its default device any more after this
def test_tensors_are_made_on_the_chosen_device(monkeypatch):
    monkeypatch.setattr(torch, "Generator", torch.Generator)
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, getattr(torch.Tensor, name))
    before = torch.get_default_device()
    try:
        device.put_on("meta")
        assert torch.zeros(2).device.type == "meta"
        device.put_on("cpu:0")
        assert torch.randn(2, generator=torch.Generator().manual_seed(0)).numpy().shape == (2,)
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


def test_tests_left_out_on_another_device_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "NAME", "cuda")
    assert "autocast" in device.left_out("test_autocast_changes_nothing[forward_kl]")
    assert device.left_out("test_same_inputs_give_the_same_bits[forward_kl]") is None
    monkeypatch.setattr(device, "NAME", "cpu")
    assert device.left_out("test_autocast_changes_nothing[forward_kl]") is None
