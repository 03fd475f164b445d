"""Loss and gradients equal the float64 oracle, for every kind of logits and every block size."""

import copy
import gc
import inspect
import math
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import device
import engine_processes
import losses
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from engine_inputs import (
    FUNCTIONS,
    INF,
    KINDS,
    LABELS,
    NAN,
    Inputs,
    agree,
    close,
    every_divergence,
    every_kind,
    exact,
    exact_kd,
    inputs,
    numpy,
    relative_error,
    sides,
    skip_unsupported,
)
from parts.memory import LiveTensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import kdloss
from kdloss import LazyLogits, Mixture, TopKLogits, VanillaKD
from kdloss.engine import LabelTask, Problem, TeacherTask, fused, per_position
from kdloss.engine.side import Side

# -- loss and gradients equal the oracle --


@every_divergence
@every_kind
def test_every_kind_in_row_blocks_equals_the_oracle_in_value_and_every_gradient(name, kind, block_sizes):
    skip_unsupported(name, kind)
    x, keep = inputs(), LABELS != -100
    for temperature, alpha in ((1.0, 0.0), (2.0, 0.4), (3.0, 0.4)):
        expected = exact(name, x, temperature, alpha, LABELS, keep)
        criterion = VanillaKD(temperature, alpha, divergence=FUNCTIONS[name])
        agree(criterion(*sides(kind, x, temperature), LABELS), x, expected, 1e-10)


@every_divergence
@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k uniform"])
def test_float32_agrees_with_float64_to_1e_5(name, kind, block_sizes):
    skip_unsupported(name, kind)
    x, keep = inputs(dtype=torch.float32), LABELS != -100
    for temperature in (1.0, 2.0):
        expected = exact(name, x, temperature, 0.4, LABELS, keep)
        criterion = VanillaKD(temperature, 0.4, divergence=FUNCTIONS[name])
        loss = criterion(*sides(kind, x, temperature), LABELS)
        assert loss.dtype == torch.float32
        agree(loss, x, expected, 1e-5)


@every_divergence
def test_bfloat16_is_no_worse_than_the_plain_recipe(name, block_sizes):
    """Compare both with float64 on the same rounded inputs, by the sum of the errors over several draws."""
    errors = {kind: np.zeros(3) for kind in ("dense", "lazy", "plain")}
    for seed in range(3):
        x, keep = inputs((2, 7), classes=23, dtype=torch.bfloat16, seed=seed), LABELS != -100
        value, slopes = exact(name, x, 2.0, 0.4, LABELS, keep)
        criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name])
        z, t = (F.linear(*side)[keep].float() for side in (x.student, x.teacher))
        recipe = 0.4 * F.cross_entropy(z, LABELS[keep]) + 0.6 * plain_kd(name, z, t, LABELS[keep])
        for kind, total in errors.items():
            loss = recipe if kind == "plain" else criterion(*sides(kind, x), LABELS)
            assert loss.dtype == torch.float32
            assert abs(loss.item() - value) <= abs(recipe.item() - value) + 1e-5 * value
            slope = torch.autograd.grad(loss, x.student, retain_graph=True)
            assert all(g.dtype == torch.bfloat16 for g in slope)
            total += [relative_error(g, s) for g, s in zip(slope, slopes, strict=True)]
    plain = errors.pop("plain")
    for ours in errors.values():
        assert (ours <= 1.1 * plain).all(), (ours, plain)


def plain_kd(name, z, t, labels, temperature=2.0):
    """The KL as one writes it without a library; other divergences as functions on tensors."""
    log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    if name == "forward_kl":
        return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if name == "reverse_kl":
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    function = FUNCTIONS[name]
    extra = {"labels": labels} if "labels" in inspect.signature(function).parameters else {}
    return function(z, t, temperature=temperature, **extra).mean()


@every_divergence
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_divergence_called_without_a_criterion_takes_every_kind_and_any_upstream_gradient(name, kind, block_sizes):
    skip_unsupported(name, kind)
    x, function = inputs(), FUNCTIONS[name]
    labels = LABELS.clamp_min(0)
    extra = {"labels": labels} if "labels" in inspect.signature(function).parameters else {}
    upstream = torch.randn(2, 7, dtype=torch.float64)
    upstream[0, 2] = 0
    everywhere = torch.ones(2, 7, dtype=torch.bool)
    values = function(*sides(kind, x, 3.0), temperature=3.0, **extra)
    assert values.shape == (2, 7)
    agree(values * upstream, x, exact(name, x, 3.0, 0.0, labels, everywhere, upstream), 1e-10)


# -- block sizes, numbers of rows, ignored positions, memory layouts --


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("scratch", [1, 3, 100])
def test_block_sizes_change_neither_loss_nor_gradients_of_any_number_of_rows(block, scratch, block_sizes):
    block_sizes(block, scratch)
    for rows in (1, 7, 13):
        x = inputs((rows,))
        labels = torch.arange(rows) % 11
        expected = exact("forward_kl", x, 2.0, 0.4, labels, labels >= 0)
        for kind in ("dense", "lazy", "mixture", "top-k bucket"):
            agree(VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), labels), x, expected, 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", [(0,), (0, 3), (2, 0), (0, 0), (2, 1), (1, 1)])
def test_a_batch_without_positions_has_zero_loss_and_zero_gradients(kind, causal, positions):
    if causal and len(positions) < 2:
        pytest.skip("causal needs a time dimension")
    if not causal and 0 not in positions:
        pytest.skip("without the causal shift there are positions")
    x = inputs(positions)
    labels = torch.zeros(positions, dtype=torch.long)
    for criterion, passed_labels in (
        (VanillaKD(causal=causal), labels),
        (VanillaKD(alpha=0.0, causal=causal), None),
        (VanillaKD(causal=causal, reduction="sum"), labels),
    ):
        loss = criterion(*sides(kind, x), passed_labels)
        assert loss.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, x.student))
    none = VanillaKD(causal=causal, reduction="none")(*sides(kind, x), labels)
    assert none.numel() == 0


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k renormalise"])
@pytest.mark.parametrize("pattern", ["none", "all", "all but one", "labels", "mask", "both"])
@pytest.mark.parametrize("causal", [False, True])
def test_only_positions_kept_by_labels_and_mask_count(kind, pattern, causal, block_sizes):
    x = inputs((2, 7, 2) if not causal else (2, 7))
    labels = torch.randint(11, x.student[0].shape[:-1])
    mask = None
    if pattern == "all":
        labels[:] = -100
    if pattern == "all but one":
        labels[:] = -100
        labels[1, 3] = 4
    if pattern in ("labels", "both"):
        labels[torch.rand(labels.shape) > 0.6] = -100
    if pattern in ("mask", "both"):
        mask = torch.rand(labels.shape) > 0.4
    keep = labels != -100 if mask is None else (labels != -100) & mask
    y = labels
    if causal:  # logits at t belong to the label at t + 1
        y = torch.cat([labels[:, 1:], labels[:, :1]], 1)
        keep = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], 1)
    loss = VanillaKD(2.0, 0.4, causal=causal)(*sides(kind, x, 2.0), labels, mask=mask)
    agree(loss, x, exact("forward_kl", x, 2.0, 0.4, y, keep, divisor=max(int(keep.sum()), 1)), 1e-10)
    none = VanillaKD(2.0, 0.4, causal=causal, reduction="none")(*sides(kind, x, 2.0), labels, mask=mask)
    shown = keep[:, :-1] if causal else keep
    assert none.shape == shown.shape
    assert not none[~shown].any()
    total = exact("forward_kl", x, 2.0, 0.4, y, keep, upstream=torch.ones(keep.shape))
    agree(none, x, total, 1e-10)


def test_without_labels_and_mask_causal_leaves_out_the_last_position(block_sizes):
    x = inputs()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[:, -1] = False
    expected = exact("forward_kl", x, 2.0, 0.0, LABELS, keep)
    for kind in ("dense", "lazy", "top-k bucket"):
        agree(VanillaKD(2.0, 0.0, causal=True)(*sides(kind, x, 2.0)), x, expected, 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
def test_logits_without_a_position_dimension_are_one_position(kind, every_block_size):
    x, label = inputs(()), torch.tensor(3)
    row = inputs((1,))  # the same random numbers
    expected = exact("forward_kl", row, 2.0, 0.4, label[None], torch.tensor([True]))
    loss = VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), label)
    slopes = [expected[1][0][0], *expected[1][1:]]
    agree(loss, x, (expected[0], slopes), 1e-10)
    ignored = VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), torch.tensor(-100))
    assert ignored.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(ignored, x.student))


LAYOUTS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.stack([t, torch.full_like(t, NAN)], 1)[:, 0],
    "classes first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "backwards": lambda t: t.flip(0, 1).flip(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", [LABELS, LABELS.clamp_min(0)], ids=["some ignored", "none ignored"])
def test_the_memory_layout_changes_neither_loss_nor_gradients(layout, labels, every_block_size):
    x, turn, keep = inputs(), LAYOUTS[layout], labels != -100
    expected = exact("forward_kl", x, 2.0, 0.4, labels, keep)
    hidden, weight, bias = x.student
    teacher, criterion = LazyLogits(*x.teacher).dense(), VanillaKD(2.0, 0.4)
    agree(criterion(turn(LazyLogits(*x.student).dense()), turn(teacher), labels), x, expected, 1e-10)
    lazy = LazyLogits(turn(hidden), weight.T.contiguous().T, bias)
    agree(criterion(lazy, LazyLogits(turn(x.teacher[0]), *x.teacher[1:]), labels), x, expected, 1e-10)
    stored = TopKLogits.of(teacher, 11, temperature=2.0)
    stored = TopKLogits(turn(stored.indices.double()).long(), turn(stored.log_probs), temperature=2.0)
    agree(
        criterion(turn(LazyLogits(*x.student).dense()), stored, labels), x, expected, 1e-8
    )  # the probability of the other classes, 0, has rounding errors


@pytest.mark.parametrize("labels", [LABELS, LABELS.clamp_min(0)], ids=["some ignored", "none ignored"])
def test_one_row_expanded_to_all_positions_gets_the_sum_of_their_gradients(labels, every_block_size):
    keep = labels != -100
    row, target = torch.randn(11, dtype=torch.float64, requires_grad=True), torch.randn(11).double()
    (s, t), y = numpy(row, target), labels[keep].numpy()

    def loss(z):
        z = z + np.zeros((len(y), 1))
        return (0.4 * oracles.cross_entropy(z, y) + 0.6 * oracles.forward_kl(z, t + 0 * z.real, 2.0)).mean()

    slope = oracles.gradient(loss, s)
    for overwrite in (False, True):
        for shape in ((2, 7, 11), (14, 11)):
            y_shape = labels.reshape(shape[:-1])
            student, teacher = row.clone().expand(shape), target.expand(shape)
            value = VanillaKD(2.0, 0.4, overwrite_logits=overwrite)(student, teacher, y_shape)
            assert value.item() == pytest.approx(loss(s), rel=1e-12)
            close(torch.autograd.grad(value, row)[0], slope, 1e-10)
    hidden, weight = torch.ones(1, dtype=torch.float64), row[:, None]
    value = VanillaKD(2.0, 0.4)(LazyLogits(hidden.expand(2, 7, 1), weight), target.expand(2, 7, 11), labels)
    close(torch.autograd.grad(value, row)[0], slope, 1e-10)


@every_divergence
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_at_ignored_positions_changes_no_bit(name, garbage, every_block_size):
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name])
    bad = LABELS == -100

    top_k = name not in losses.NO_TOP_K | losses.BY_CLASS

    def results(fill):
        x = inputs(dtype=torch.float32)
        logits = LazyLogits(*x.student).dense().detach()
        teacher = LazyLogits(*x.teacher).dense()
        stored = TopKLogits.of(teacher, 5, temperature=2.0)
        for t in (x.student[0].data, x.teacher[0], logits, teacher, stored.log_probs, stored.log_rest):
            t[bad] = fill
        logits.requires_grad_()
        losses = [
            (criterion(LazyLogits(*x.student), LazyLogits(*x.teacher), LABELS), x.student),
            (criterion(logits, teacher, LABELS), [logits]),
        ]
        if top_k:
            losses.append((criterion(logits, stored, LABELS), [logits]))
        for loss, leaves in losses:
            slopes = torch.autograd.grad(loss, leaves)
            assert not slopes[0][bad].any()
            yield from (loss.detach(), *slopes)

    clean, dirty = list(results(0.0)), list(results(garbage))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(t.isfinite().all() for t in clean)


# -- upstream gradients and frozen tensors --


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-30, 65536.0])
def test_scaling_a_loss_scales_its_gradients(kind, scale, every_block_size):
    x = inputs()
    loss = VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), LABELS)
    value, slopes = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100)
    agree(scale * loss, x, (scale * value, [scale * s for s in slopes]), 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
def test_values_per_position_take_any_upstream_gradient(kind, block_sizes):
    x = inputs()
    upstream = torch.randn(2, 7, dtype=torch.float64)
    upstream[1] = 0
    upstream[0, 3] = 0
    values = VanillaKD(2.0, 0.4, reduction="none")(*sides(kind, x, 2.0), LABELS)
    expected = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100, upstream)
    agree(values * upstream, x, expected, 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_of_two_tasks_can_be_differentiated_without_the_other(kind, alpha, block_sizes):
    x, labels = inputs(), LABELS.clamp_min(0)
    student, teacher = sides(kind, x)
    tasks = [LabelTask(labels.reshape(-1)), TeacherTask(kdloss.divergences.forward_kl, teacher, 2.0)]
    both = per_position(*Problem.of(tasks, student, None, 14))
    expected = exact("forward_kl", x, 2.0, alpha, labels, labels >= 0, torch.ones(2, 7))
    agree(both[0 if alpha else 1], x, expected, 1e-10)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_tensors_get_no_gradient_and_the_others_the_right_one(frozen, reduction, block_sizes):
    x = inputs()
    expected = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100, torch.ones(2, 7))
    for i in frozen:
        x.student[i].requires_grad_(False)
    VanillaKD(2.0, 0.4, reduction=reduction)(*sides("lazy", x), LABELS).sum().backward()
    for i, (leaf, slope) in enumerate(zip(x.student, expected[1], strict=True)):
        assert (leaf.grad is None) == (i in frozen)
        if i not in frozen:
            close(leaf.grad, slope, 1e-10)


def test_a_head_without_bias_gives_gradients_to_hidden_states_and_weight(block_sizes):
    x = inputs()
    with torch.no_grad():
        x.student[2].zero_()
    expected = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100)
    loss = VanillaKD(2.0, 0.4)(LazyLogits(*x.student[:2]), LazyLogits(*x.teacher), LABELS)
    for ours, slope in zip(torch.autograd.grad(loss, x.student[:2]), expected[1][:2], strict=True):
        close(ours, slope, 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradients_again_and_a_freed_graph_raises_torchs_error(
    kind, reduction, block_sizes
):
    x = inputs()
    student, teacher = sides(kind, x)
    if kind != "lazy":  # so that the error comes from the engine's node
        student = student.detach().requires_grad_()
    leaves = x.student if kind == "lazy" else [student]
    loss = VanillaKD(reduction=reduction)(student, teacher, LABELS).sum()
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(a, 3 * c, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("number", [int, torch.tensor])
def test_micro_batches_of_unequal_size_add_up_to_the_gradient_of_one_batch(kind, number, block_sizes):
    x = inputs((7,))
    labels = LABELS[0]
    items = number(int((labels != -100).sum()))
    expected = exact("forward_kl", x, 2.0, 0.4, labels, labels != -100)
    for part in (slice(0, 1), slice(1, 2), slice(2, 7)):  # the second has no position that counts
        rows = Inputs(student=[x.student[0][part], *x.student[1:]], teacher=[x.teacher[0][part], *x.teacher[1:]])
        criterion = VanillaKD(2.0, 0.4)
        criterion(*sides(kind, rows, 2.0), labels[part], num_items_in_batch=items).backward()
    for leaf, slope in zip(x.student, expected[1], strict=True):
        close(leaf.grad, slope, 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "autocast"])
def test_small_float16_gradients_survive_under_a_scaler(kind, block_sizes):
    """A GradScaler multiplies the loss to keep its gradients above the smallest number of float16."""
    items, scale = 2**22, 2.0**22
    x = inputs(dtype=torch.float32 if kind == "autocast" else torch.float16)
    leaves = x.student
    labels = LABELS
    with torch.autocast("cpu", torch.float16, enabled=kind == "autocast"):
        student, teacher = sides("dense" if kind == "dense" else "lazy", x)
        if kind == "dense":
            student = student.detach().requires_grad_()
            leaves = [student]
        loss = VanillaKD(2.0, 0.4)(student, teacher, labels, num_items_in_batch=items)
    slopes = torch.autograd.grad(loss * scale, leaves)
    if kind == "dense":
        z, t = numpy(student, teacher)
        keep = (labels != -100).numpy()
        y = labels.numpy()[keep]

        def total(v):
            kd = oracles.forward_kl(v[keep], t[keep], 2.0)
            return (0.4 * oracles.cross_entropy(v[keep], y) + 0.6 * kd).sum() / items

        expected = [oracles.gradient(total, z)]
    else:
        expected = exact("forward_kl", x, 2.0, 0.4, labels, labels != -100, divisor=items)[1]
    for ours, slope in zip(slopes, expected, strict=True):
        assert relative_error(ours, slope * scale) < 3e-3


def test_bfloat16_logits_beyond_the_range_of_float16_give_exact_losses_and_gradients(block_sizes):
    student = torch.tensor([[3e38, -3e38, 0.0], [1e5, 0.0, -1e5]], dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([[3e38, -3e38, 0.0], [0.0, 1e5, 0.0]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 1])
    values = VanillaKD(1.0, 0.5, reduction="none")(student, teacher, labels)
    gap = float(teacher[1, 1])  # of both terms: the student's probability of the true class is e^-gap
    assert values.tolist() == [0.0, gap]
    slope = torch.autograd.grad(values.sum(), student)[0]
    assert slope.tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]]


# -- autocast, activation checkpointing, processes, compilers --


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast_lazy_logits_equal_dense_ones(name, reduction, block_sizes):
    x = inputs((2, 7), classes=23, dtype=torch.float32)
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name], reduction=reduction)
    results = []
    for kind in ("dense", "lazy", "lazy teacher"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(*sides(kind, x), LABELS).sum()
        assert loss.dtype == torch.float32
        results.append((loss, torch.autograd.grad(loss, x.student)))
    dense = results[0]
    keep = LABELS != -100
    slopes = exact(name, x, 2.0, 0.4, LABELS, keep, None if reduction == "mean" else torch.ones(2, 7))[1]
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, dense[0], rtol=1e-5, atol=1e-6)
        for ours, way, slope in zip(gradients, dense[1], slopes, strict=True):
            assert ours.dtype == torch.float32
            assert relative_error(ours, slope) < 1.5 * relative_error(way, slope) + 1e-3


def test_under_autocast_a_mixture_of_lazy_teachers_equals_the_dense_teacher(block_sizes):
    x = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lazy = LazyLogits(x.teacher[0].bfloat16(), *x.teacher[1:])
        student = LazyLogits(*x.student).dense()
        dense = VanillaKD()(student, lazy.dense(), LABELS)
        assert VanillaKD()(student, Mixture([lazy, lazy]), LABELS).item() == pytest.approx(dense.item(), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(reentrant, kind, block_sizes):
    x = inputs()
    expected = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100)

    def loss(*student):
        both = Inputs(student=student, teacher=x.teacher)
        return VanillaKD(2.0, 0.4)(*sides(kind, both), LABELS)

    agree_by_backward(checkpoint(loss, *x.student, use_reentrant=reentrant), x, expected)


def agree_by_backward(loss, x, expected):
    np.testing.assert_allclose(loss.item(), expected[0], rtol=1e-12)
    loss.backward()
    for leaf, slope in zip(x.student, expected[1], strict=True):
        close(leaf.grad, slope, 1e-10)


def test_two_processes_with_the_head_inside_ddp_get_the_gradients_of_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(engine_processes.__file__)
    subprocess.run([*command, str(script), str(tmp_path)], check=True, timeout=120)
    model, tokens, labels = engine_processes.data()
    logits = model.head(model.body(tokens).tanh())
    keep = labels != -100
    log_q, log_p = (
        (logits[keep] / 2).log_softmax(-1),
        (engine_processes.teacher()[keep] / 2).log_softmax(-1),
    )
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (0.5 * F.cross_entropy(logits[keep], labels[keep]) + 0.5 * kl).backward()
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(results[name], parameter.grad, rtol=1e-10, atol=1e-12)


COMPILED = {
    **{kind: VanillaKD(2.0, 0.4, causal=True) for kind in KINDS if kind not in ("lazy student", "lazy teacher")},
    "lazy none": VanillaKD(2.0, 0.4, reduction="none"),
    "top-k bucket reverse": VanillaKD(2.0, 0.4, divergence=kdloss.divergences.reverse_kl),
    "lazy truncated": VanillaKD(2.0, 0.4, vocabulary=kdloss.truncate),
}


@pytest.mark.parametrize("case", COMPILED)
def test_every_kind_compiles_without_a_graph_break(case, block_sizes):
    x, call = inputs(), COMPILED[case]
    kind = case.removesuffix(" none").removesuffix(" reverse").removesuffix(" truncated")

    def loss(hidden, weight, bias):
        both = Inputs(student=[hidden, weight, bias], teacher=x.teacher)
        logits, target = sides(kind, both, 2.0)
        return call(logits, target, LABELS)

    plain = loss(*x.student)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*x.student)
    torch.testing.assert_close(compiled, plain, rtol=1e-10, atol=1e-12)
    slopes = (torch.autograd.grad(way.sum(), x.student) for way in (compiled, plain))
    for ours, eager in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-12)


def test_several_teachers_compile_without_a_graph_break():
    x = inputs()
    criterion = kdloss.MultiTeacherKD([0.3, 0.7])
    student, teacher = (t.detach() for t in sides("dense", x))
    student.requires_grad_()
    plain = criterion(student, [teacher, teacher.flip(-1)], LABELS)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, [teacher, teacher.flip(-1)], LABELS), plain)


@every_divergence
@pytest.mark.parametrize("kind", ["dense", "lazy", "mixture", "top-k uniform"])
def test_tensors_without_data_give_a_loss_of_the_right_shape(name, kind):
    skip_unsupported(name, kind)
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name])

    def on(device):
        student, teacher = sides("lazy", inputs(dtype=torch.float32))
        x = Inputs(
            student=[t.detach().to(device).requires_grad_() for t in vars(student).values() if torch.is_tensor(t)],
            teacher=[t.to(device) for t in vars(teacher).values() if torch.is_tensor(t)],
        )
        return x, torch.zeros(2, 7, dtype=torch.long, device=device)

    x, labels = on("meta")
    loss = criterion(*sides(kind, x, 2.0), labels)
    assert loss.is_meta
    assert loss.shape == ()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = Inputs(
            student=[torch.empty(*s, requires_grad=True) for s in ((2, 7, 4), (11, 4), (11,))],
            teacher=[torch.empty(s) for s in ((2, 7, 4), (11, 4), (11,))],
        )
        loss = criterion(*sides(kind, x, 2.0), torch.zeros(2, 7, dtype=torch.long))
        loss.backward()
    assert loss.shape == ()
    assert x.student[0].grad.shape == (2, 7, 4)


def test_torch_func_grad_differentiates_a_criterion_on_tensors():
    x = inputs()
    student, teacher = (t.detach() for t in sides("dense", x))
    criterion = VanillaKD(2.0, 0.4)
    slope = torch.func.grad(lambda z: criterion(z, teacher, LABELS))(student)
    student.requires_grad_()
    expected = torch.autograd.grad(criterion(student, teacher, LABELS), student)[0]
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)
    hidden, weight, bias = (t.detach() for t in x.student)

    def lazy(h):
        return criterion(LazyLogits(h, weight, bias), teacher, LABELS)

    expected = exact("forward_kl", x, 2.0, 0.4, LABELS, LABELS != -100)[1][0]
    close(torch.func.grad(lazy)(hidden), expected, 1e-10)


SMOOTH = [name for name in FUNCTIONS if not losses.EXEMPT.get(name, set()) & {"kink", "frozen"}]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k uniform"])
def test_second_derivatives_are_right(name, kind, block_sizes):
    skip_unsupported(name, kind)
    x = inputs((3,), classes=5, width=2)
    labels = torch.tensor([3, -100, 0])
    reduction = "none" if kind == "lazy" else "mean"
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name], reduction=reduction)

    def loss(*student):
        return criterion(*sides(kind, Inputs(student=student, teacher=x.teacher), 2.0), labels)

    assert torch.autograd.gradcheck(loss, x.student)
    assert torch.autograd.gradgradcheck(loss, x.student)


def test_second_derivatives_of_a_single_row_without_positions_are_right():
    student, teacher = torch.randn(2, 5, dtype=torch.float64)
    criterion, label = VanillaKD(2.0, 0.4), torch.tensor(3)
    assert torch.autograd.gradgradcheck(lambda s: criterion(s, teacher, label), student.requires_grad_())


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket", "mixture"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_that_is_still_referenced_frees_the_logits_after_backward(kind, reduction):
    x = inputs()
    criterion = VanillaKD(reduction=reduction)
    student, teacher = sides(kind, x)
    if kind in ("lazy", "mixture"):
        hidden = x.student[0] * 1  # a model's output
        student = LazyLogits(hidden, *x.student[1:])
    tensors = [student] if torch.is_tensor(student) else [student.hidden]
    tensors += {
        "dense": lambda: [teacher],
        "lazy": lambda: [teacher.hidden],
        "mixture": lambda: [teacher.teachers[1]],
        "top-k bucket": lambda: [teacher.log_probs],
    }[kind]()
    x.teacher.clear()
    watched = [weakref.ref(t) for t in tensors]
    loss = criterion(student, teacher, LABELS)
    loss.sum().backward()
    hidden = None
    del student, teacher, tensors
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)
    assert loss.isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_deleting_a_loss_frees_its_tensors_without_the_garbage_collector(kind):
    x = inputs()
    hidden = x.student[0] * 1
    node = weakref.ref(hidden)
    student, teacher = sides(kind, Inputs(student=[hidden, *x.student[1:]], teacher=x.teacher))
    criterion = VanillaKD()
    gc.disable()
    try:
        loss = criterion(student, teacher, LABELS)
        logits = weakref.ref(student) if kind == "dense" else node
        del student, hidden, loss
        assert logits() is None
        assert node() is None
    finally:
        gc.enable()
    assert all(not term.requires_grad for term in criterion.components.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_value_is_the_same_and_there_is_no_graph(mode, kind, block_sizes):
    x = inputs()
    value = VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), LABELS).item()
    with mode():
        loss = VanillaKD(2.0, 0.4)(*sides(kind, x, 2.0), LABELS)
        none = VanillaKD(2.0, 0.4, reduction="none")(*sides(kind, x, 2.0), LABELS)
    assert not loss.requires_grad
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert none.sum().item() / (LABELS != -100).sum().item() == pytest.approx(value, rel=1e-12)


# -- extreme numbers, through the criterion --


def absolute_tolerance(name, temperature):
    """The absolute tolerance; positive for losses made of differences of probabilities, which float32 rounds."""
    rough = losses.EXEMPT.get(name, set()) & {"kink", "relational"}
    return max(1.0, temperature**2) * 1e-6 if rough else 0.0


def from_criterion_and_oracle(name, student, teacher, temperature, labels=None):
    """Values and gradient from a criterion and from the oracle."""
    student = student.clone().requires_grad_()
    criterion = VanillaKD(temperature, 0.0, divergence=FUNCTIONS[name], reduction="none")
    values = criterion(student, teacher, labels)
    slope = torch.autograd.grad(values.sum(), student)[0]
    s, t = numpy(student, teacher)
    y = None if labels is None else labels.numpy()
    expected = exact_kd(name, s, t, temperature, y)
    return (
        values.detach(),
        slope,
        expected,
        oracles.gradient(lambda v: exact_kd(name, v, t, temperature, y), s),
    )


@every_divergence
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 10.0, 100.0])
def test_logits_of_1e4_at_any_temperature_agree_with_float64(name, temperature):
    student, teacher = 1e4 * torch.rand(2, 4, 9).mul(2).sub(1)
    value, slope, expected, expected_slope = from_criterion_and_oracle(
        name, student, teacher, temperature, torch.arange(4)
    )
    rough = absolute_tolerance(name, temperature)
    tiny = 1e-38 + 1e-15 * expected.max()  # a card's smallest number, and what float64 rounds in a row of value 0
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=rough if device.NAME == "cpu" else rough + tiny)
    size = max(abs(expected_slope).max(), expected.max() / temperature)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-5 * size + rough)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "few" not in losses.EXEMPT.get(name, ())])
def test_a_large_vocabulary_at_high_temperature_agrees_with_float64(name):
    student, teacher = 3 * torch.randn(2, 2, 32_000)
    labels = torch.tensor([5, 31_999])
    for temperature in (20.0, 100.0):
        criterion = VanillaKD(temperature, 0.0, divergence=FUNCTIONS[name], reduction="none")
        value = criterion(student, teacher, labels)
        expected = exact_kd(name, *numpy(student, teacher), temperature, labels.numpy())
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=absolute_tolerance(name, temperature))


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_has_zero_loss_and_zero_gradient(name, dtype):
    for temperature in (0.05, 1.0, 2.0, 7.0, 100.0):
        x = inputs((3, 5), classes=97, dtype=dtype)
        logits = (4 * torch.randn(3, 5, 97)).to(dtype).requires_grad_()
        lazy = LazyLogits(*x.student)
        labels = torch.zeros(3, 5, dtype=torch.long)
        criterion = VanillaKD(temperature, 0.0, divergence=FUNCTIONS[name])
        if "teacher" in losses.EXEMPT.get(name, ()):
            pytest.skip("its value is not 0 where the student equals the teacher")
        for student, teacher, leaves in (
            (logits, logits, [logits]),
            (logits, logits.detach().clone(), [logits]),
            (lazy, lazy, x.student),
        ):
            loss = criterion(student, teacher, labels)
            assert abs(loss.item()) <= 1e-6
            for slope in torch.autograd.grad(loss, leaves):
                assert slope.abs().max() <= 1e-6


@every_divergence
@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k uniform"])
def test_the_same_inputs_give_the_same_bits(name, kind):
    skip_unsupported(name, kind)
    x = inputs(dtype=torch.float32)
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name])
    results = []
    for _ in range(2):
        loss = criterion(*sides(kind, x, 2.0), LABELS)
        results.append([loss, *torch.autograd.grad(loss, x.student)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_classes_excluded_by_one_side_or_both_give_the_exact_finite_or_infinite_loss(every_block_size):
    half, one = torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([[0.0, -INF, -INF]])
    for temperature in (0.5, 1.0, 4.0):
        log_2 = temperature**2 * math.log(2)
        for name, student, teacher, expected, slope in (
            ("forward_kl", half, one, log_2, [-temperature / 2, temperature / 2, 0]),  # T (q - p)
            ("forward_kl", one, half, INF, None),
            ("reverse_kl", one, half, log_2, [0, 0, 0]),
            ("reverse_kl", half, one, INF, None),
        ):
            student = student.clone().requires_grad_()
            loss = VanillaKD(temperature, 0.0, divergence=FUNCTIONS[name])(student, teacher)
            assert loss.item() == pytest.approx(expected)
            if slope is not None:
                np.testing.assert_allclose(torch.autograd.grad(loss, student)[0], [slope], atol=1e-7)


@every_divergence
def test_classes_excluded_by_both_sides_add_nothing(name):
    if getattr(FUNCTIONS[name], "needs_logits", False):
        pytest.skip("compares logits, which must be finite")
    if "relational" in losses.EXEMPT.get(name, ()):
        pytest.skip("averages over the classes")
    student, teacher = torch.randn(2, 3, 6)
    extra, labels = torch.full((3, 2), -INF), torch.tensor([0, 3, 5])
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name])
    results = []
    for wide in (False, True):
        z, t = ((torch.cat([side, extra], 1) if wide else side) for side in (student, teacher))
        z = z.clone().requires_grad_()
        loss = criterion(z, t, labels)
        results.append((loss, torch.autograd.grad(loss, z)[0]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1][:, :6], results[0][1])
    assert results[1][1][:, 6:].abs().max() <= 1e-30  # some divergences use a mass of e^-80 for an excluded class


@every_divergence
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_or_infinity_at_a_position_that_counts_makes_the_loss_nan_or_infinite(name, bad, whose):
    student, teacher = torch.randn(2, 3, 6)
    (student if whose == "student" else teacher)[1, 2] = bad
    student.requires_grad_()
    labels = torch.tensor([0, 3, 5])
    values = VanillaKD(2.0, 0.0, divergence=FUNCTIONS[name], reduction="none")(student, teacher, labels)
    if (name, whose, bad) != ("bernoulli_kl", "teacher", INF):  # here +inf is the logit of probability 1
        assert not values[1].isfinite()
    criterion = VanillaKD(2.0, 0.4, divergence=FUNCTIONS[name], check_finite=True)
    with pytest.raises(ValueError, match=rf"{whose}\[1, 2\] is {bad} at a position that counts"):
        criterion(student, teacher, labels)
    criterion(student, teacher, torch.tensor([0, -100, 5]))


# -- memory --


def peak(step):
    with LiveTensors() as live:
        step()
    return live.peak


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "custom"])
def test_four_times_the_tokens_take_hardly_more_memory_and_full_logits_are_never_allocated(name, block_sizes):
    block_sizes(64, 16)
    classes, width = 4_000, 2
    divergence = custom if name == "custom" else FUNCTIONS[name]
    largest = []

    class Largest(LiveTensors):
        def count(self, storage):
            largest.append(storage.nbytes())
            super().count(storage)

    def step(tokens):
        x = inputs((tokens,), classes=classes, width=width, dtype=torch.float32)
        labels = torch.randint(classes, (tokens,))
        with Largest() as live:
            VanillaKD(divergence=divergence)(LazyLogits(*x.student), LazyLogits(*x.teacher), labels).backward()
        return live.peak

    few, many = step(128), step(512)
    assert many <= 1.05 * few
    assert max(largest) < 128 * classes * 4


def test_lazy_logits_with_a_token_map_are_computed_in_blocks(block_sizes):
    block_sizes(16, 16)
    x = inputs((512,), classes=400, width=2, dtype=torch.float32)
    ids = torch.arange(390)
    shared = kdloss.TokenMap(ids, ids.flip(0))
    labels = torch.zeros(512, dtype=torch.long)

    def step(vocabulary):
        criterion = VanillaKD(vocabulary=vocabulary)
        student, teacher = (LazyLogits(*side) for side in (x.student, [t.detach() for t in x.teacher]))
        return peak(lambda: criterion(student, teacher, labels).backward())

    assert step(shared) < 512 * 390 * 4


@pytest.mark.parametrize("labels", [LABELS.repeat(16, 4), None])
def test_transposed_logits_are_read_in_blocks_without_a_full_copy(labels, block_sizes):
    block_sizes(4, 4)
    student, teacher = (torch.randn(28, 32, 101).transpose(0, 1) for _ in range(2))
    size = student.untyped_storage().nbytes()
    student.requires_grad_()
    criterion = VanillaKD(alpha=0.5 if labels is not None else 0.0)
    used = peak(lambda: criterion(student, teacher, labels).backward())
    assert used < 3.2 * size  # student, teacher, the gradient and a few rows


AT = torch.ops.aten
PRODUCTS = (AT.mm.default, AT.mm.out, AT.addmm.out, AT.addmm_.default)


def test_ignored_positions_are_never_multiplied_with_the_head(block_sizes):
    seen = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in PRODUCTS:
                left, right = args[-2:]
                seen.append(left.shape[0] * left.shape[1] * right.shape[1])
            return func(*args, **(kwargs or {}))

    x = inputs((10,))
    for labels in (torch.zeros(10).long(), torch.tensor([0, -100] * 5)):
        with Products():
            VanillaKD()(LazyLogits(*x.student), LazyLogits(*x.teacher), labels).backward()
        seen.append(None)
    both = [sum(seen[: seen.index(None)]), sum(seen[seen.index(None) + 1 : -1])]
    assert both == [4 * 10 * 4 * 11, 4 * 5 * 4 * 11]


# -- custom divergences --


def custom(student, teacher, *, temperature=1.0):
    """Half the squared distance between log-probabilities."""
    gap = (student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)
    return gap.square().sum(-1) / 2


def custom_with_options(student, teacher, *, temperature=1.0, power=2):
    gap = (student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)
    return (gap**power).sum(-1) / 2


def custom_with_labels(student, teacher, *, labels, temperature=1.0):
    """The same for the labelled class only."""
    gap = (student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)
    return gap.gather(-1, labels.unsqueeze(-1)).squeeze(-1).square() / 2


def exact_custom(z, t, temperature, power=2):
    gap = oracles.log_softmax(z, temperature) - oracles.log_softmax(t, temperature)
    return (gap**power).sum(-1) / 2


def exact_custom_with_labels(z, t, temperature, labels):
    gap = oracles.log_softmax(z, temperature) - oracles.log_softmax(t, temperature)
    return np.take_along_axis(gap, labels[..., None], -1)[..., 0] ** 2 / 2


@pytest.mark.parametrize(
    ("divergence", "oracle"),
    [
        (custom, exact_custom),
        (partial(custom_with_options, power=4), partial(exact_custom, power=4)),
        (custom_with_labels, exact_custom_with_labels),
    ],
    ids=["a function", "a partial", "with labels"],
)
@pytest.mark.parametrize("kind", ["dense", "lazy", "mixture"])
def test_a_custom_divergence_is_called_on_blocks_and_has_the_right_gradients(
    divergence, oracle, kind, block_sizes, monkeypatch
):
    monkeypatch.setattr(oracles, "custom", oracle, raising=False)
    rows = []

    def record(student, teacher, *, temperature, **extra):
        rows.append(len(student))
        return divergence(student, teacher, temperature=temperature, **extra)

    if divergence is custom_with_labels:

        def recording(student, teacher, *, labels, temperature):
            return record(student, teacher, temperature=temperature, labels=labels)
    else:

        def recording(student, teacher, *, temperature):
            return record(student, teacher, temperature=temperature)

    x, keep = inputs(), LABELS != -100
    for alpha in (0.0, 0.4):
        loss = VanillaKD(3.0, alpha, divergence=recording)(*sides(kind, x), LABELS)
        agree(loss, x, exact("custom", x, 3.0, alpha, LABELS, keep), 1e-10)
    assert max(rows) <= 4
    loss = VanillaKD(3.0, 0.4, divergence=divergence)(*sides(kind, x), LABELS)
    agree(loss, x, exact("custom", x, 3.0, 0.4, LABELS, keep), 1e-10)


def test_a_custom_divergence_that_returns_no_value_per_position_is_refused(block_sizes):
    x = inputs()
    for wrong in (
        lambda student, teacher, *, temperature: (student - teacher).square().mean(),
        lambda student, teacher, *, temperature: (student - teacher).square(),
    ):
        for kind in ("dense", "lazy"):
            with pytest.raises(ValueError, match=r"one value per position"):
                VanillaKD(divergence=wrong)(*sides(kind, x), LABELS)


def test_the_criterions_temperature_replaces_that_of_a_partial_and_its_other_options_apply(block_sizes):
    x = inputs()
    student, teacher = sides("lazy", x)
    expected = VanillaKD(3.0)(student, teacher, LABELS)
    other = VanillaKD(3.0, divergence=partial(kdloss.divergences.forward_kl, temperature=8.0))(student, teacher, LABELS)
    assert other.item() == expected.item()
    plain = partial(partial(kdloss.divergences.forward_kl, t_squared=True), t_squared=False)
    plain = VanillaKD(3.0, 0.0, divergence=plain)(student, teacher, LABELS)
    agree(9 * plain, x, exact("forward_kl", x, 3.0, 0.0, LABELS, LABELS != -100), 1e-10)


OPTIONS = [
    (name, option)
    for name, function in FUNCTIONS.items()
    for option in inspect.signature(function).parameters
    if option in ("beta", "skew") and getattr(function, "closed_form", None)
]


def test_an_option_out_of_range_is_refused_by_closed_forms_and_by_functions():
    student, teacher = sides("lazy", inputs())
    for name, option in OPTIONS:
        function = partial(FUNCTIONS[name], **{option: -1.5})
        with pytest.raises(ValueError, match=option):
            VanillaKD(divergence=function)(student, teacher, LABELS)
        with pytest.raises(ValueError, match=option):
            function(student, teacher)
    with pytest.raises(TypeError, match="power"):
        VanillaKD(divergence=partial(kdloss.divergences.forward_kl, power=2))(student, teacher, LABELS)


# -- bad input and copies of every kind --


@pytest.mark.parametrize("shape", [(2, 1, 11), (1, 7, 11), (7, 11), (2, 7, 1), (11,), (2, 7, 12), (2, 6, 11)])
def test_nothing_broadcasts_between_kinds(shape):
    x = inputs()
    student, teacher = LazyLogits(*x.student), torch.randn(shape, dtype=torch.float64)
    hidden, weight = torch.randn(*shape[:-1], 3).double(), torch.randn(shape[-1], 3).double()
    stored = TopKLogits.of(teacher, 1)
    wrong = [teacher, LazyLogits(hidden, weight), stored, Mixture([teacher, teacher])]
    said = (
        r"teacher's logits are \(11?,\), and have no axis" if shape == (11,) else r"nothing is broadcast|student has 11"
    )
    for target in wrong:
        for side in (student, student.dense()):
            with pytest.raises(ValueError, match=said):
                VanillaKD()(side, target, LABELS)
            with pytest.raises(ValueError, match=r"nothing is broadcast|student has 11"):
                kdloss.divergences.forward_kl(side, target)


def test_wrong_types_devices_and_labels_are_refused_with_a_remedy():
    x = inputs()
    student, teacher = sides("lazy", x)
    meta = LazyLogits(*(t.to("meta") for t in x.teacher))
    cases = [
        (
            TypeError,
            "student's logits are a tensor or LazyLogits, got TopKLogits",
            (TopKLogits.of(teacher.dense(), 3), teacher, LABELS),
        ),
        (
            TypeError,
            "student's logits are a tensor or LazyLogits, got Mixture",
            (Mixture([teacher]), teacher, LABELS),
        ),
        (ValueError, r"teacher logits on meta; write teacher logits\.to\('cpu'\)", (student, meta, LABELS)),
        (TypeError, "floating point", (student, torch.zeros(2, 7, 11).long(), LABELS)),
        (TypeError, r"labels\.long\(\)", (student, teacher, LABELS.int())),
        (ValueError, r"labels have shape \(2, 6\)", (student, teacher, LABELS[:, 1:])),
        (TypeError, "pass a tensor", (student, None, LABELS)),
        (ValueError, "needs labels|labels", (student, teacher, None)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            VanillaKD()(*arguments)
    with pytest.raises(TypeError, match=r"mask\.bool\(\)"):
        VanillaKD()(student, teacher, LABELS, mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"labels\[0, 3\] is 10, outside the 10 classes"):
        VanillaKD(check_finite=True)(*(LazyLogits(h, w[:10], b[:10]) for h, w, b in (x.student, x.teacher)), LABELS)


def test_no_input_is_written_to(every_block_size):
    x = inputs()
    for kind in KINDS:
        student, teacher = sides(kind, x, 2.0)
        tensors = [t for side in (student, teacher) for t in tensors_of(side)]
        before = [t.detach().clone() for t in tensors]
        VanillaKD()(student, teacher, LABELS).backward()
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def tensors_of(x):
    if torch.is_tensor(x):
        return [x]
    if isinstance(x, list | tuple):
        return [t for y in x for t in tensors_of(y)]
    return [t for y in vars(x).values() for t in tensors_of(y)] if hasattr(x, "__dataclass_fields__") else []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_every_kind_can_be_copied_and_pickled(kind, copied, block_sizes):
    x = inputs()
    student, teacher = sides(kind, x, 2.0)
    student = student.detach()
    twins = copied(student), copied(teacher)
    assert VanillaKD()(*twins, LABELS).item() == VanillaKD()(student, teacher, LABELS).item()
    for t in tensors_of(teacher):
        t.fill_(NAN if t.is_floating_point() else 0)
    assert VanillaKD()(*twins, LABELS).isfinite()


def test_a_head_of_another_dtype_is_multiplied_in_the_dtype_of_the_hidden_states(block_sizes):
    x = inputs(dtype=torch.float32)
    hidden, head = x.student[0].detach().bfloat16(), x.student[1:]
    mixed = LazyLogits(hidden, *head)
    same = LazyLogits(hidden, *(t.detach().bfloat16() for t in head))
    teacher = LazyLogits(*x.teacher)
    expected = VanillaKD()(same.dense(), teacher, LABELS).item()
    for student in (mixed, mixed.dense(), same):
        assert VanillaKD()(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-6)
    loss = VanillaKD()(mixed, teacher, LABELS)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, head))


def test_backward_outside_of_autocast_multiplies_in_the_dtypes_of_the_forward(block_sizes):
    """Gradients of a sum are computed in the forward, those of values per position in the backward."""
    x, results = inputs((2, 7), classes=23, dtype=torch.float32), []
    for reduction in ("sum", "none"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = VanillaKD(2.0, 0.4, reduction=reduction)(*sides("lazy", x), LABELS).sum()
        results.append(torch.autograd.grad(loss, x.student))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TrainedTemperature(torch.nn.Module):
    """A divergence with a trainable temperature."""

    def __init__(self):
        super().__init__()
        self.log_t = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, student, teacher, *, temperature):
        t = self.log_t.exp()
        log_q, log_p = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_parameters_of_a_divergence_get_gradients_or_the_divergence_is_refused(block_sizes):
    student, teacher = losses.sample(5, 9, dtype=torch.float64)
    learned = TrainedTemperature()
    loss = VanillaKD(1.0, 0.0, divergence=learned)(student, teacher)
    results = torch.autograd.grad(loss, [student, learned.log_t])
    t = learned.log_t.exp()
    log_q, log_p = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    exact = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(-1).mean(), [student, learned.log_t])
    torch.testing.assert_close(results, exact)
    with pytest.raises(ValueError, match=r"of its own to train.*nn\.Module"):
        VanillaKD(1.0, 0.0, divergence=lambda s, t, *, temperature: learned(s, t, temperature=1.0))(student, teacher)


# -- several tasks of one student in one sweep --

# Divergence, temperature and number of the teacher. The first two share both, the third shares only the teacher.
SPECS = (("forward_kl", 2.0, 0), ("jsd", 2.0, 0), ("reverse_kl", 3.0, 0), ("total_variation", 1.0, 1))
COUNTED = LABELS.reshape(-1)[(LABELS != -100).reshape(-1)]
INDEX = (LABELS != -100).reshape(-1).nonzero().squeeze(1)
WEIGHTS = torch.tensor([0.3, 1.5, -0.4, 0.7, 2.0], dtype=torch.float64)[:, None]


def other_teacher(x, seed=5):
    return Inputs(student=x.student, teacher=inputs(dtype=x.teacher[0].dtype, seed=seed).teacher)


def student_and_tasks(kind, x, specs=SPECS, labels=COUNTED):
    """The student, and tasks: a cross-entropy, and divergences from two teachers."""
    made = {}
    tasks = [LabelTask(labels)]
    for name, temperature, which in specs:
        key = which, temperature if kind.startswith("top-k") else None
        if key not in made:
            made[key] = sides(kind, (x, other_teacher(x))[which], temperature)
        tasks.append(TeacherTask(FUNCTIONS[name], made[key][1], temperature))
    return next(iter(made.values()))[0], tasks


def exact_several(x, weights, labels=COUNTED, specs=SPECS, index=INDEX):
    """Values of the tasks, and the gradients of their weighted sum."""
    leaves, index = numpy(*x.student), index.numpy()
    teachers = [numpy(*side.teacher) for side in (x, other_teacher(x))]
    w = weights.detach().double().numpy() * np.ones((1 + len(specs), len(index)))

    def values(h, weight, b):
        z = (h.reshape(-1, h.shape[-1]) @ weight.T + b)[index]
        results = [oracles.cross_entropy(z, labels.numpy())]
        for name, temperature, which in specs:
            h, weight, b = teachers[which]
            t = (h.reshape(-1, h.shape[-1]) @ weight.T + b)[index]
            results.append(exact_kd(name, z, t, temperature, None))
        return np.stack(results)

    def at(i, v):
        return (w * values(*(v if k == i else leaf for k, leaf in enumerate(leaves)))).sum()

    return values(*leaves), [oracles.gradient(partial(at, i), leaves[i]) for i in range(3)]


def all_agree(loss, values, x, expected, weights, tolerance=1e-10):
    np.testing.assert_allclose(values.detach(), expected[0], rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx((weights.detach().double().numpy() * expected[0]).sum(), rel=tolerance)
    for mine, slope in zip(torch.autograd.grad(loss, x.student), expected[1], strict=True):
        close(mine, slope, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tasks_give_the_weighted_sum_of_their_losses(kind, block_sizes):
    x = inputs()
    student, tasks = student_and_tasks(kind, x)
    for task in tasks:
        task.check(student)
    loss, values = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), WEIGHTS)
    assert values.shape == (5, len(COUNTED))
    assert not values.requires_grad
    all_agree(loss, values, x, exact_several(x, WEIGHTS), WEIGHTS)


@every_divergence
def test_divergences_at_one_temperature_do_not_disturb_each_other(name, block_sizes):
    """Each comes before and after another divergence that shares its student and teacher."""
    parameters = set(inspect.signature(FUNCTIONS[name]).parameters)
    if {"labels", "mask"} & parameters:
        pytest.skip("needs labels or a mask")
    x = inputs()
    specs = ((name, 2.0, 0), ("symmetric_kl", 2.0, 0), (name, 2.0, 0), ("skewed_reverse_kl", 2.0, 1))
    student, tasks = student_and_tasks("dense", x, specs)
    loss, values = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), WEIGHTS)
    all_agree(loss, values, x, exact_several(x, WEIGHTS, specs=specs), WEIGHTS)
    assert torch.equal(values[1], values[3])


@pytest.mark.parametrize("kind", ["dense", "lazy", "mixture", "top-k bucket"])
@pytest.mark.parametrize("reduction", ["fused", "per position"])
def test_a_task_gives_no_gradient_to_positions_of_weight_0(kind, reduction, every_block_size):
    x = inputs()
    weights = torch.rand(3, len(COUNTED), dtype=torch.float64)
    weights[0, ::2] = weights[1, 1::3] = weights[2, 4:6] = 0
    two = (("forward_kl", 2.0, 0), ("reverse_kl", 2.0, 1))
    expected = exact_several(x, weights, specs=two)
    labels = COUNTED.clone()
    labels[::2] = (labels[::2] + 3) % 11
    student, (ce, first, second) = student_and_tasks(kind, x, two, labels)
    for task, off in ((first, weights[1] == 0), (second, weights[2] == 0)):
        for t in tensors_by_position(task.teacher):
            t.view(14, -1)[INDEX[off]] = NAN
    problem, local = Problem.of([ce, first, second], student, INDEX, len(COUNTED))
    if reduction == "fused":
        loss, values = fused(problem, local, weights)
    else:
        values = per_position(problem, local)
        loss = (values.where(weights != 0, 0) * weights).sum()
    on = weights.numpy() != 0
    np.testing.assert_allclose(values.detach().numpy()[on], expected[0][on], rtol=1e-10, atol=1e-12)
    assert loss.item() == pytest.approx((weights.numpy() * expected[0])[on].sum(), rel=1e-10)
    slopes = torch.autograd.grad(loss, x.student, retain_graph=True)
    again = torch.autograd.grad(loss, x.student, create_graph=True)
    for mine, second_way, slope in zip(slopes, again, expected[1], strict=True):
        close(mine, slope, 1e-10)
        close(second_way.detach(), slope, 1e-10)


def tensors_by_position(teacher):
    if isinstance(teacher, Mixture):
        return [t for part in teacher.teachers for t in tensors_by_position(part)]
    if isinstance(teacher, TopKLogits):
        return [teacher.log_probs]
    return [teacher.hidden if isinstance(teacher, LazyLogits) else teacher]


@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_a_nan_student_has_a_zero_gradient_at_positions_of_weight_0(kind, every_block_size):
    x = inputs()
    x.student[0].data[0, 3] = NAN
    student, tasks = student_and_tasks(kind, x, labels=COUNTED.new_zeros(14))
    weights = torch.ones(5, 14, dtype=torch.float64)
    weights[:, 3] = 0
    loss, _ = fused(*Problem.of(tasks, student, None, 14), weights)
    assert loss.isfinite()
    leaf = student.detach().requires_grad_() if kind == "dense" else None
    if leaf is not None:
        loss, _ = fused(*Problem.of(tasks, leaf, None, 14), weights)
    for graph in (False, True):
        slopes = torch.autograd.grad(loss, x.student if leaf is None else leaf, retain_graph=True, create_graph=graph)
        assert not slopes[0].view(14, -1)[3].any()
        assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("shape", [(5, 1), (5, len(COUNTED))])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradients_of_the_weights_are_the_values_of_the_tasks(kind, shape, frozen, every_block_size):
    x = inputs()
    student, tasks = student_and_tasks(kind, x)
    weights = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    if frozen:
        student = student.detach()
    loss, values = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), weights)
    (slope,) = torch.autograd.grad(3 * loss, weights, retain_graph=True)
    expected = 3 * exact_several(x, weights)[0]
    close(slope, expected if shape[1] > 1 else expected.sum(1, keepdims=True), 1e-10)
    if not frozen:
        all_agree(loss, values, x, exact_several(x, weights), weights)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
@pytest.mark.parametrize("shape", [(5, 1), (5, len(COUNTED))])
def test_tasks_of_weight_0_have_their_values_and_these_are_the_gradients_of_the_weights(kind, shape, every_block_size):
    x = inputs()
    student, tasks = student_and_tasks(kind, x)
    weights = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    loss, values = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), weights)
    expected = exact_several(x, weights)[0]
    close(values, expected, 1e-10)
    (slope,) = torch.autograd.grad(loss, weights)
    close(slope, expected if shape[1] > 1 else expected.sum(1, keepdims=True), 1e-10)


@pytest.mark.parametrize("kind", ["dense", "lazy", "top-k bucket"])
def test_second_derivatives_by_student_and_weights_are_right(kind, block_sizes):
    x, labels = inputs((3,), classes=5, width=2), torch.tensor([3, 1, 0])
    other = inputs((3,), classes=5, width=2, seed=1)

    def loss(weights, *student):
        z, t = sides(kind, Inputs(student=student, teacher=x.teacher), 2.0)
        u = sides(kind, Inputs(student=student, teacher=other.teacher), 1.0)[1]
        tasks = [LabelTask(labels, smoothing=0.1)]
        tasks += [TeacherTask(FUNCTIONS[n], t, 2.0) for n in ("forward_kl", "jsd")]
        tasks += [TeacherTask(kdloss.divergences.reverse_kl, u)]
        return fused(*Problem.of(tasks, z, None, 3), weights)[0]

    for shape in ((4, 1), (4, 3)):
        weights = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(loss, (weights, *x.student))
        assert torch.autograd.gradgradcheck(loss, (weights, *x.student))


@pytest.mark.parametrize("kind", ["dense", "lazy", "mixture", "top-k bucket"])
def test_values_of_several_tasks_take_any_upstream_gradient(kind, block_sizes):
    x = inputs()
    student, tasks = student_and_tasks(kind, x)
    upstream = torch.randn(5, len(COUNTED), dtype=torch.float64)
    values = per_position(*Problem.of(tasks, student, INDEX, len(COUNTED)))
    all_agree((values * upstream).sum(), values, x, exact_several(x, upstream), upstream)


CLASS_WEIGHTS = torch.tensor([0.0, 2.0, 0.5, 1.0, 1.5, 0.0, 1.0, 3.0, 1.0, 0.25, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS], ids=["equal classes", "class weights"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_cross_entropy_of_any_labels_in_blocks_equals_the_oracle(
    kind, soft, weight, smoothing, temperature, every_block_size
):
    x = inputs()
    student, teacher = sides(kind, x)
    labels = torch.rand(2, 7, 11, dtype=torch.float64).softmax(-1) if soft else COUNTED
    tasks = [LabelTask(labels, smoothing, weight), LabelTask(COUNTED)]
    weights = torch.rand(2, len(COUNTED), dtype=torch.float64)
    weights[0, 3] = 0
    if temperature is not None:  # the cross-entropy uses the exponentials of this task
        tasks.append(TeacherTask(kdloss.divergences.total_variation, teacher, temperature))
        weights = torch.cat([weights, torch.zeros(1, len(COUNTED))])
    for task in tasks:
        task.check(student)
    loss, values = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), weights)
    leaves = numpy(*x.student)
    y = labels.reshape(14, 11)[INDEX].numpy() if soft else COUNTED.numpy()

    def total(h, w, b):
        z = (h.reshape(-1, 4) @ w.T + b)[INDEX.numpy()]
        first = oracles.cross_entropy(z, y, smoothing, None if weight is None else weight.numpy())
        return first, (
            weights[0].numpy() * first + weights[1].numpy() * oracles.cross_entropy(z, COUNTED.numpy())
        ).sum()

    np.testing.assert_allclose(values[0], total(*leaves)[0], rtol=1e-10, atol=1e-12)
    z = LazyLogits(*x.student).dense().reshape(14, 11)[INDEX]
    torchs = F.cross_entropy(z, torch.from_numpy(y).to(z.device), weight, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(values[0], torchs.detach(), rtol=1e-10, atol=1e-12)
    for i, mine in enumerate(torch.autograd.grad(loss, x.student)):
        at = lambda v, i=i: total(*(v if k == i else leaf for k, leaf in enumerate(leaves)))[1]  # noqa: E731
        close(mine, oracles.gradient(at, leaves[i]), 1e-10)


@pytest.mark.parametrize("temperature", [None, 2.0, 3.0])
def test_a_cross_entropy_is_infinite_only_where_labels_give_weight_to_an_excluded_class(temperature):
    z = torch.tensor([[1.0, 0.0, -INF], [0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    cases = [
        (LabelTask(soft), True),
        (LabelTask(torch.tensor([2, 0]), 0.0, weight), True),
        (LabelTask(torch.tensor([2, 1]), 0.1, weight), True),
        (LabelTask(torch.tensor([1, 0]), 0.1), False),
        (LabelTask(torch.tensor([2, 0])), False),
        (LabelTask(soft.flip(-1)), False),
    ]
    for task, finite in cases:
        others = [] if temperature is None else [TeacherTask(kdloss.divergences.forward_kl, z.detach(), temperature)]
        loss, values = fused(*Problem.of([task, *others], z, None, 2), torch.ones(1 + len(others), 1))
        by_class = None if task.class_weights is None else weight.numpy()
        expected = oracles.cross_entropy(z.detach().numpy(), task.labels.numpy(), task.smoothing, by_class)
        np.testing.assert_allclose(values[0], expected, rtol=1e-12)
        assert (values[0, 0].item() < INF) == finite
        plain = task.values(z)
        np.testing.assert_allclose(plain.detach(), expected, rtol=1e-12)
        if finite:
            ours, plains = (torch.autograd.grad(way.sum(), z)[0] for way in (loss, plain))
            torch.testing.assert_close(ours, plains, rtol=1e-12, atol=1e-12)


def multiplications(step):
    """The number of multiplications in all matrix products of a step."""
    results = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in PRODUCTS:
                left, right = args[-2:]
                results.append(left.shape[0] * left.shape[1] * right.shape[1])
            return func(*args, **(kwargs or {}))

    with Products():
        step()
    return sum(results)


def test_a_head_is_multiplied_once_per_block_whatever_the_number_of_tasks(block_sizes):
    x = inputs()
    student = LazyLogits(*x.student)
    teacher, other = LazyLogits(*x.teacher), LazyLogits(*other_teacher(x).teacher)
    both = Mixture([teacher, other])
    divergences = kdloss.divergences

    def cost(*tasks):
        tasks = [LabelTask(LABELS.reshape(-1).clamp_min(0)), *tasks]
        problem, local = Problem.of(tasks, student, None, 14)
        weights = torch.ones(len(tasks), 1)
        return multiplications(lambda: fused(problem, local, weights)[0].backward())

    product = 14 * 4 * 11
    first = TeacherTask(divergences.forward_kl, teacher, 2.0)
    second = TeacherTask(divergences.jsd, teacher.detach(), 3.0)
    third = TeacherTask(divergences.logit_mse, teacher)
    assert cost() == 3 * product  # the head, and its gradients by weight and hidden states
    assert cost(first) == 4 * product
    assert cost(first, second, third) == 4 * product
    assert cost(first, second, replace(second, teacher=other)) == 5 * product
    mixed = [TeacherTask(divergences.forward_kl, both, t) for t in (1.0, 2.0)]
    assert cost(first, replace(second, teacher=other), *mixed) == 5 * product


@pytest.mark.parametrize("index", [None, INDEX])
def test_several_tasks_overwrite_logits_with_the_gradient_of_their_sum(index, block_sizes):
    x = inputs()
    student, teacher = (t.detach() for t in sides("dense", x))
    labels = LABELS.reshape(-1).clamp_min(0) if index is None else COUNTED
    tasks = [LabelTask(labels), TeacherTask(kdloss.divergences.logit_mse, teacher)]
    tasks += [
        TeacherTask(FUNCTIONS[n], t, T) for n, T, t in (("forward_kl", 2.0, teacher), ("jsd", 1.0, teacher.flip(0)))
    ]
    results = []
    for overwrite in (False, True):
        leaf = student.clone().requires_grad_()
        problem, local = Problem.of(tasks, leaf, index, len(labels), overwrite)
        loss, _ = fused(problem, local, torch.ones(4, 1))
        loss.backward()
        assert torch.equal(leaf, leaf.grad) == overwrite
        results.append((loss, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["dense", "lazy"])
def test_small_float16_gradients_of_several_tasks_survive_under_a_scaler(kind, block_sizes):
    items, x = 2.0**22, inputs(dtype=torch.float16)
    student, tasks = student_and_tasks(kind, x)
    weights = (torch.rand(5, 1, dtype=torch.float64) / items).requires_grad_()
    loss, _ = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), weights)
    *slopes, by_weights = torch.autograd.grad(loss * items, [*x.student, weights])
    z = kind == "lazy"  # the dense student's logits were rounded to float16
    values, expected = exact_several(x, weights * items)
    for ours, slope in zip(slopes, expected, strict=True):
        assert relative_error(ours, slope) < (3e-3 if z else 6e-3)
    np.testing.assert_allclose(by_weights, items * values.sum(1, keepdims=True), rtol=1e-2)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)])
def test_several_tasks_give_frozen_tensors_no_gradient_and_accumulate_those_of_the_others(frozen, block_sizes):
    x = inputs()
    expected = exact_several(x, WEIGHTS)
    for i in frozen:
        x.student[i].requires_grad_(False)
    student, tasks = student_and_tasks("lazy", x)
    loss, _ = fused(*Problem.of(tasks, student, INDEX, len(COUNTED)), WEIGHTS)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for i, (leaf, slope) in enumerate(zip(x.student, expected[1], strict=True)):
            assert (leaf.grad is None) == (i in frozen)
            if i not in frozen:
                close(leaf.grad, times * slope, 1e-10)


FORMS = {
    **{name: f.closed_form for name, f in FUNCTIONS.items() if getattr(f, "closed_form", None)},
    "jsd 0.01": partial(kdloss.divergences.jsd.closed_form, beta=0.01, normalize=True),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_a_closed_form_changes_no_input_and_returns_its_slope_in_new_memory(name, temperature):
    z, t = torch.randn(2, 5, 9, dtype=torch.float64)
    z[0, 3] = z[1, 2] = t[1, 2] = t[2, 4] = -INF
    q, p = Side(z, temperature), Side(t, temperature)
    before = [v.clone() for side in (q, p) for v in (side.bits, side.probs, side.log_total, side.top)]
    _, slope, _ = FORMS[name](q, p)
    after = [v for side in (q, p) for v in (side.bits, side.probs, side.log_total, side.top)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert slope.data_ptr() not in {v.data_ptr() for v in after}


def test_bits_are_the_same_whether_read_before_or_after_the_probabilities():
    z = 3 * torch.randn(4, 300)
    before, after = Side(z, 3.0), Side(z, 3.0)
    torch.testing.assert_close(before.bits, (z - z.amax(-1, keepdim=True)) / (3 * math.log(2)))
    torch.testing.assert_close(after.probs, (z / 3).softmax(-1))
    for name in ("probs", "log_total", "bits"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert before.bits.data_ptr() != before.probs.data_ptr() != after.bits.data_ptr() != after.probs.data_ptr()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_a_nan_in_a_teachers_row_makes_the_gradient_of_that_row_nan(name):
    z, t = torch.randn(2, 3, 300)
    z.requires_grad_()
    t[1, 7] = torch.nan
    getattr(kdloss.divergences, name)(z, t).sum().backward()
    assert z.grad[1].isnan().all()
    assert z.grad[[0, 2]].isfinite().all()


def test_total_variation_has_zero_gradient_where_the_student_equals_the_teacher():
    z = torch.randn(3, 300)
    t = z.clone()
    t[2] += torch.randn(300)
    z.requires_grad_()
    kdloss.divergences.total_variation(z, t).sum().backward()
    assert not z.grad[:2].any()
    assert z.grad[2].all()


def test_invalid_labels_smoothing_and_class_weights_are_refused_with_a_remedy():
    student = torch.randn(2, 7, 11)
    ones = torch.ones(11)
    cases = [
        (TypeError, r"labels\.long\(\)", LabelTask(COUNTED.int())),
        (ValueError, r"probabilities of the classes, of the logits' shape \(2, 7, 11\)", LabelTask(torch.rand(14))),
        (ValueError, "smoothing must lie between 0 and 1", LabelTask(COUNTED, 1.5)),
        (ValueError, "one per class", LabelTask(COUNTED, 0.0, ones[1:])),
        (TypeError, "weight must be floating point", LabelTask(COUNTED, 0.0, ones.long())),
    ]
    for error, match, task in cases:
        with pytest.raises(error, match=match):
            task.check(student)
    with pytest.raises(ValueError, match=r"labels have shape \(10,\) and there are 14 rows"):
        Problem.of([LabelTask(COUNTED[:10])], student, None, 14)


def test_hard_labels_of_a_top_k_teacher_are_refused_unless_its_tail_is_uniform():
    student, teacher = torch.randn(2, 3, 9)
    for tail in ("bucket", "renormalise"):
        with pytest.raises(ValueError, match=r"hard_labels looks up.*tail='uniform'"):
            kdloss.divergences.hard_labels(student, TopKLogits.of(teacher, 4, tail=tail))
    stored = kdloss.divergences.hard_labels(student, TopKLogits.of(teacher, 4, tail="uniform"))
    torch.testing.assert_close(stored, kdloss.divergences.hard_labels(student, teacher))
