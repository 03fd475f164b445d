"""Top-k logits keep their narrow types until they are used, and are computed without a copy of the logits."""

import mpmath
import numpy as np
import oracles
import pytest
import torch
from accelerate.utils import send_to_device
from parts.memory import LiveTensors
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import kdloss
from kdloss import TopKLogits, VanillaKD
from kdloss.targets import looks

INF = float("inf")
NARROW = [torch.uint8, torch.uint16, torch.uint32]


def narrow(dtype, vocabulary=11, rows=4, k=3):
    """Top-k logits with an empty last position and an empty slot in the first, and the same in int64 and float64."""
    generator = torch.Generator().manual_seed(0)
    kept = TopKLogits.of(torch.randn(rows, vocabulary, generator=generator), k)
    indices, log_probs = kept.indices.clone(), kept.log_probs.half()
    indices[0, 1], indices[-1] = -1, -1
    wide = TopKLogits(indices, log_probs.double(), log_rest=kept.log_rest.half().double(), vocabulary=vocabulary)
    small = indices.to(dtype)  # where -1 becomes the largest number
    return TopKLogits(small, log_probs, log_rest=kept.log_rest.half(), vocabulary=vocabulary), wide


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "uniform"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_largest_unsigned_number_is_an_empty_slot_where_it_is_no_class(dtype, tail, name):
    ours, wide = narrow(dtype)
    student = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for kept in (ours, wide):
        kept = TopKLogits(kept.indices, kept.log_probs, tail, 1.0, kept.log_rest, 11)
        assert kept.empty().tolist() == [False, False, False, True]
        for loss in (
            VanillaKD(1.0, 0.0, divergence=getattr(kdloss.divergences, name), reduction="none")(student, kept),
            getattr(kdloss.divergences, name)(*kept.against(student)),
            VanillaKD(1.0, 0.0, vocabulary=kdloss.TokenMap(torch.arange(11), torch.arange(11)))(student, kept),
        ):
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), student)[0]))
    for mine, expected in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [256, None])
def test_the_largest_unsigned_number_is_a_class_if_the_vocabulary_has_it_or_is_unknown(vocabulary):
    indices, log_probs = torch.tensor([[255, 3]]), torch.tensor([[0.5, 0.25]]).log()
    student = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    small = TopKLogits(indices.to(torch.uint8), log_probs, vocabulary=vocabulary)
    assert small.ids().tolist() == [[255, 3]]
    log_q = oracles.log_softmax(student.double().numpy())[0]
    q = np.array([log_q[255], log_q[3], np.log(1 - np.exp(log_q[[255, 3]]).sum())])
    p = np.array([0.5, 0.25, 0.25])
    assert VanillaKD(1.0, 0.0)(student, small).item() == pytest.approx((p * (np.log(p) - q)).sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", [*NARROW, torch.int32, torch.int64])
def test_top_k_logits_keep_their_types_when_they_are_moved_or_pinned(dtype, monkeypatch):
    kept, _ = narrow(dtype) if dtype in NARROW else (TopKLogits.of(torch.randn(4, 11), 3), None)
    kept = TopKLogits(kept.indices.to(dtype), kept.log_probs.half(), log_rest=kept.log_rest.half(), vocabulary=11)
    types = dtype, torch.float16, torch.float16
    moved = kept.to("meta", non_blocking=True)
    assert (moved.device.type, moved.indices.dtype, moved.log_probs.dtype, moved.log_rest.dtype) == ("meta", *types)
    assert torch.equal(kept.to("cpu").ids(), kept.ids())
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *device: pinned.append(x.nbytes) or x)
    again = pin_memory({"labels": torch.zeros(4, dtype=torch.int8), "teacher": kept})["teacher"]
    assert sorted(pinned) == sorted([4, 12 * dtype.itemsize, 24, 8])
    assert (again.indices.dtype, again.log_probs.dtype, again.log_rest.dtype) == types
    assert torch.equal(again.ids(), kept.ids())


def test_accelerate_moves_top_k_logits_with_the_batch():
    there = send_to_device({"teacher": TopKLogits.of(torch.randn(4, 11), 3)}, "meta", non_blocking=True)["teacher"]
    assert (type(there), there.device.type) == (TopKLogits, "meta")


def test_a_stored_teacher_on_the_cpu_is_moved_to_the_students_device(monkeypatch):
    kept, moves, answers = TopKLogits.of(torch.randn(4, 11), 3), [], iter([True, False])
    monkeypatch.setattr(kdloss._runner, "on_cpu", lambda device: next(answers))
    monkeypatch.setattr(kdloss._runner, "moved", lambda *x: moves.append(x) or kept)
    distill = kdloss.Distiller(None, VanillaKD())
    distill(torch.nn.Linear(5, 11), torch.randn(4, 5), labels=torch.arange(4), teacher=kept)
    assert moves == [(kept, torch.device("cpu"))]


def test_copies_to_the_cpu_block_and_copies_from_it_do_not(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: waits.append(not non_blocking) or x)
    kdloss.teacher.moved([torch.zeros(2)], "cpu")
    kdloss.teacher.moved([torch.zeros(2)], "cuda:0")
    assert waits == [True, False]


def test_a_dataloader_worker_sends_top_k_logits_unchanged():
    kept, _ = narrow(torch.uint16)
    (got,) = DataLoader([kept], batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert (got.indices.dtype, got.log_probs.dtype) == (torch.uint16, torch.float16)
    assert torch.equal(got.ids(), kept.ids())
    assert torch.equal(got.log_probs, kept.log_probs)


def test_top_k_logits_that_were_checked_are_not_checked_again_in_a_step(monkeypatch):
    kept, _ = narrow(torch.uint16)
    made = TopKLogits.of(torch.randn(4, 11), 3)
    monkeypatch.setattr(looks, "look", None)
    monkeypatch.setattr(looks, "in_range", None)
    student = torch.randn(4, 11)
    for teacher in (kept, made, kept.at(lambda x: x[:4]), made.detach()):
        assert VanillaKD(1.0, 0.0, check_finite=True)(student, teacher).isfinite()
        assert kdloss.divergences.forward_kl(student, teacher).isfinite().all()


# -- the most probable classes of logits --


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_log_rest_keeps_its_digits_beside_a_class_with_almost_all_probability(dtype, temperature):
    for row in ([50.0, 0.0, 0.5, -0.25], [110.0, 0.0, 0.5, -0.25], [1e4, 0.0, 0.5, -INF], [1e4, 9984.0, 9984.0, -1e4]):
        logits = torch.tensor([row]).to(dtype)
        kept = TopKLogits.of(logits, 1, temperature=temperature)
        with mpmath.workdps(60):
            z = [mpmath.mpf(x) / temperature for x in logits[0].double().tolist()]
            log_z = mpmath.log(mpmath.fsum(map(mpmath.exp, z)))
            rest = float(mpmath.log(mpmath.fsum(map(mpmath.exp, z[1:]))) - log_z)
            first = float(z[0] - log_z)
        digits = 1e-12 if dtype == torch.float64 else 5e-7
        assert kept.log_rest.item() == pytest.approx(rest, rel=digits)
        assert kept.log_probs.item() == pytest.approx(first, rel=digits, abs=1e-7)


def test_log_rest_is_minus_infinity_without_other_mass_and_infinite_or_nan_logits_give_nan():
    logits = torch.tensor([[1.0, 0.0, -INF, -INF], [1.0, INF, 0.0, 0.0], [1.0, torch.nan, 0.0, 0.0], [0.0] * 4])
    two, all_four = TopKLogits.of(logits, 2), TopKLogits.of(logits, 4)
    assert two.log_rest.tolist()[0] == all_four.log_rest.tolist()[0] == all_four.log_rest.tolist()[3] == -INF
    assert two.log_probs.isnan().any(-1).tolist() == [False, True, True, False]
    np.testing.assert_allclose(two.log_probs[3], [np.log(0.25)] * 2, rtol=1e-6)
    np.testing.assert_allclose(all_four.log_probs[0].exp(), [np.e / (np.e + 1), 1 / (np.e + 1), 0, 0], rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["contiguous", "a slice"])
def test_many_positions_are_computed_a_few_at_a_time_without_a_copy_of_all_logits(causal):
    logits = torch.randn(3, 300, 4000, generator=torch.Generator().manual_seed(0))
    logits = logits[:, :-1] if causal else logits
    with LiveTensors() as live:
        live.count(logits.untyped_storage())
        before = live.now
        kept = TopKLogits.of(logits, 5, temperature=2.0)
    assert live.peak - before < 0.5 * 4 * logits.numel()
    exact = oracles.log_softmax(logits.double().numpy(), 2.0)
    order = np.argsort(-exact, -1)[..., :5]
    assert (kept.indices.numpy() == order).mean() > 0.999  # except for ties
    np.testing.assert_allclose(kept.log_probs, np.take_along_axis(exact, order, -1), rtol=1e-6)
    np.put_along_axis(exact, order, -np.inf, -1)
    np.testing.assert_allclose(kept.log_rest, np.log(np.exp(exact).sum(-1)), rtol=2e-6)


def test_top_k_logits_can_be_computed_in_compiled_and_vmapped_functions():
    def computed(z):
        kept = TopKLogits.of(z, 3, temperature=2.0)
        return kept.indices, kept.log_probs, kept.log_rest

    logits = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(computed, backend="eager", fullgraph=True)(logits), computed(logits))
    torch.testing.assert_close(torch.vmap(computed)(logits), computed(logits))
