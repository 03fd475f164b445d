"""Compiled code gives the same numbers as uncompiled code, and is not used where compilation fails."""

import logging
import math
import shutil

import losses
import measure
import numpy as np
import oracles
import pytest
import torch
from versions import since_torch

import kdloss
from kdloss import LazyLogits, TokenMap, TopKLogits, VanillaKD
from kdloss.engine import LabelTask, Problem, TeacherTask, closed_forms, compiled, fused, switch

FORMS = {x.oracle.__name__: x.function for x in losses.DIVERGENCES if getattr(x.function, "closed_form", None)}
CLASSES = 150  # one piece of 128 classes and a shorter one
LABELS = torch.tensor([3, 149, 0, 128, 127, 7])
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch):
    """Reset the switch to its default, and drop everything that was compiled."""
    monkeypatch.setattr(switch, "_mode", [])
    monkeypatch.setattr(compiled, "_blocks", {})
    torch.compiler.reset()


@pytest.fixture
def use_eager_backend(monkeypatch):
    """Return a function that makes torch.compile run the traced graphs uncompiled, in a fraction of the time."""
    compile = torch.compile
    return lambda: monkeypatch.setattr(torch, "compile", lambda f, options: compile(f, backend="eager"))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Pretend that the device is an accelerator, since top-k teachers are not compiled on CPUs."""
    monkeypatch.setattr(compiled, "on_cpu", lambda device: False)


def logits(rows=6, seed=0, dtype=torch.float64):
    """Return logits of student and teacher with some classes at -inf; in the last row a full piece of 128."""
    student, teacher = 2 * torch.randn(2, rows, CLASSES, generator=torch.Generator().manual_seed(seed)).double()
    student[1, 4] = teacher[1, 4] = -math.inf
    teacher[2, 9] = -math.inf
    teacher[-1, :128] = student[-1, :128] = -math.inf
    return student.to(dtype), teacher.to(dtype)


def values_and_gradient(mode, student, teacher, tasks, weights):
    """Return the engine's values of the tasks, and the gradient of their weighted sum."""
    switch.set_compile(mode)
    z = student.clone().requires_grad_()
    problem, local = Problem.of(tasks(teacher), z, None, len(z))
    loss, values = fused(problem, local, weights)
    return values, torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize(
    ("temperature", "really_compiled"),
    [(1.0, False), (2.0, False), (20.0, False), pytest.param(3.0, True, marks=needs_a_compiler)],
)
def test_every_closed_form_and_cross_entropy_equal_the_oracle_and_the_uncompiled_gradient(
    temperature, really_compiled, use_eager_backend
):
    if not really_compiled:
        use_eager_backend()
    student, teacher = logits()

    def tasks(teacher):
        of_teacher = [TeacherTask(f, teacher, temperature) for f in FORMS.values()]
        weighted = LabelTask(LABELS, 0.1, torch.linspace(0.5, 2, CLASSES).double())
        return [*of_teacher, LabelTask(LABELS), weighted]

    weights = torch.rand(len(FORMS) + 2, 6, dtype=torch.float64)
    weights[0, 1] = weights[-1, 2] = weights[2, 0] = 0
    weights[:, 3] = 0
    values, gradient = values_and_gradient(True, student, teacher, tasks, weights)
    assert [block.given_up for block in compiled._blocks.values()] == [False]
    for row, name in zip(values, FORMS, strict=False):
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = getattr(oracles, name)(student.numpy(), teacher.numpy(), temperature=temperature)
        np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(values[len(FORMS)], oracles.cross_entropy(student.numpy(), LABELS.numpy()), rtol=1e-9)
    plain, exact = values_and_gradient(False, student, teacher, tasks, weights)
    torch.testing.assert_close(values, plain, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-11, equal_nan=True)
    assert not gradient[3].any()


TOP_IDS = torch.stack([torch.randperm(CLASSES, generator=torch.Generator().manual_seed(i))[:5] for i in range(6)])
TOP_IDS[1, 3:] = TOP_IDS[3] = -1  # row 1 has empty slots, row 3 is empty


def logits_of_kept_classes(student, log_probs, row, tail, kept_at):
    """Return the logits of both over the kept classes of a row and, with a bucket, one logit for all others."""
    ids, log_p = TOP_IDS[row][TOP_IDS[row] >= 0].numpy(), log_probs[row][TOP_IDS[row] >= 0].numpy()
    z, t = student[row].numpy()[ids], kept_at * log_p
    if tail == "bucket":
        others = np.delete(student[row].numpy(), ids) / kept_at
        size = others.max() + np.log(np.exp(others - others.max()).sum())
        z, t = np.append(z, kept_at * size), np.append(t, kept_at * np.log1p(-np.exp(log_p).sum()))
    return z[None], t[None]


@pytest.mark.parametrize(
    ("temperature", "kept_at", "really_compiled"),
    [(1.0, 1.0, False), (3.0, 1.0, False), pytest.param(2.5, 2.5, True, marks=needs_a_compiler)],
)
def test_divergences_from_a_top_k_teacher_equal_the_oracle_and_the_uncompiled_gradient(
    temperature, kept_at, really_compiled, use_eager_backend, as_on_an_accelerator
):
    if not really_compiled:
        use_eager_backend()
    student, teacher = (x.nan_to_num(neginf=-9) for x in logits())
    student[4, TOP_IDS[4]] += 900  # the probabilities of all other classes underflow
    log_probs = (teacher / kept_at).log_softmax(-1).gather(-1, TOP_IDS.clamp_min(0))
    names = [("forward_kl", "bucket"), ("reverse_kl", "renormalise"), ("total_variation", "bucket")][
        : 1 if really_compiled else 3
    ]

    def tasks(teacher):
        kept = {tail: TopKLogits(TOP_IDS, log_probs, tail, kept_at) for _, tail in names}
        of_few = [TeacherTask(FORMS[name], kept[tail], temperature) for name, tail in names]
        return [*of_few, LabelTask(LABELS)]

    weights = torch.rand(len(names) + 1, 6, dtype=torch.float64)
    weights[0, 1] = weights[-1, 2] = 0
    weights[:, 5] = 0
    values, gradient = values_and_gradient(True, student, teacher, tasks, weights)
    assert [block.given_up for block in compiled._blocks.values()] == [False]
    for value, (name, tail) in zip(values, names, strict=False):
        for row in (0, 1, 2, 4):
            both = logits_of_kept_classes(student, log_probs, row, tail, kept_at)
            expected = getattr(oracles, name)(*both, temperature=temperature).item()
            assert value[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-12), (name, tail, row)
        assert value[3] == 0
    plain, exact = values_and_gradient(False, student, teacher, tasks, weights)
    torch.testing.assert_close(values, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-11)
    assert not gradient[5].any()


def test_the_gradient_with_a_top_k_teacher_is_rounded_once(use_eager_backend, as_on_an_accelerator):
    use_eager_backend()
    student, teacher = (x.nan_to_num(neginf=-9).bfloat16() for x in logits())

    def tasks(teacher):
        return [TeacherTask(FORMS["forward_kl"], TopKLogits.of(teacher, 60)), LabelTask(LABELS)]

    weights = torch.rand(2, 6)
    _, gradient = values_and_gradient(True, student, teacher, tasks, weights)
    _, exact = values_and_gradient(False, student.double(), teacher.double(), tasks, weights)
    assert ((gradient - exact).abs() <= 2**-8 * (1 + 1e-3) * exact.abs() + 1e-7).all()


KINDS = ["plain", "overwritten", "some ignored", "lazy", "token map", "none", "bfloat16", "one row"]
TOP_K_KINDS = ["plain", "overwritten", "lazy", "token map", "bfloat16"]


@pytest.mark.parametrize(
    ("kind", "top_k"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in TOP_K_KINDS)]
)
def test_a_compiled_criterion_gives_the_uncompiled_loss_and_gradients_for_every_kind_of_input(
    kind, top_k, use_eager_backend, as_on_an_accelerator
):
    use_eager_backend()
    student, teacher = (x.float() for x in logits(7))
    labels = torch.tensor([3, 149, 0, 128, 127, 7, 20])
    hidden, weight = torch.randn(7, 4), torch.randn(CLASSES, 4)

    def step(mode):
        switch.set_compile(mode)
        options = {"overwrite_logits": kind == "overwritten", "reduction": "none" if kind == "none" else "mean"}
        y = labels.clone()
        if kind == "some ignored":
            y[::3] = -100
        if kind == "token map":
            ids = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))[:140]
            options["vocabulary"] = TokenMap(ids, torch.arange(140))
        rows = slice(1) if kind == "one row" else slice(None)
        leaves = [student[rows].to(torch.bfloat16 if kind == "bfloat16" else torch.float32)]
        if kind == "lazy":
            leaves = [hidden, weight]
        leaves = [x.clone().requires_grad_() for x in leaves]
        z = LazyLogits(*leaves) if kind == "lazy" else leaves[0]
        other = teacher[rows, :140] if kind == "token map" else teacher[rows]
        other = other.to(leaves[0].dtype)
        other = TopKLogits.of(other, 9) if top_k else other
        loss = VanillaKD(3.0, 0.0 if top_k else 0.5, **options)(z, other, None if top_k else y[rows])
        return [loss.detach(), *torch.autograd.grad(loss.mean(), leaves)]

    rounding = {"rtol": 2**-7, "atol": 1e-3} if kind == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    for ours, plain in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(ours, plain, **rounding)
    assert [block.given_up for block in compiled._blocks.values()] == [False]


def test_a_divergence_from_a_top_k_teacher_is_not_compiled_on_a_cpu():
    student, teacher = logits()
    switch.set_compile(True)
    VanillaKD()(student.requires_grad_(), TopKLogits.of(teacher, 9), LABELS).backward()
    assert not compiled._blocks


@needs_a_compiler
@since_torch(2, 6)
@pytest.mark.parametrize("form", sorted(closed_forms.WITHOUT_SCRATCH, key=lambda form: form.__name__))
def test_a_form_without_scratch_writes_the_gradient_over_the_logits_with_little_extra_memory(form):
    student, teacher = torch.randn(2, 64, 8192)
    criterion = VanillaKD(2.0, 0.5, divergence=getattr(kdloss.divergences, form.__name__), overwrite_logits=True)
    labels = torch.randint(8192, (64,))
    switch.set_compile(True)

    def step():
        student.detach().normal_()  # logits again, in place of the gradient of the step before
        criterion(student.requires_grad_(), teacher, labels).backward()
        student.grad = None

    step()
    assert [block.given_up for block in compiled._blocks.values()] == [False]
    assert measure.peak(step) < 0.15 * student.nbytes


def test_changing_the_temperature_or_the_number_of_rows_does_not_recompile(monkeypatch):
    graphs = []
    compile = torch.compile

    def counting(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, options: compile(f, backend=counting))
    switch.set_compile(True)
    for temperature, rows in ((3.0, 8), (4.0, 5), (3.5, 8), (2.5, 7), (6.0, 6)):
        student, teacher = logits(rows)
        criterion = VanillaKD(temperature, 0.5)
        criterion(student.requires_grad_(), teacher, torch.arange(rows)).backward()
    assert len(graphs) == 1


def test_if_compilation_fails_a_warning_says_why_and_the_loss_is_correct(monkeypatch, caplog):
    def broken(function, options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    expect_uncompiled(monkeypatch, caplog, "no compiler here")


def test_compiled_code_that_gives_wrong_numbers_is_not_used(monkeypatch, caplog):
    def wrong(function, options):
        def block(rows, out):
            values = function(rows, out)
            out.mul_(1.01)
            return values

        return block

    monkeypatch.setattr(torch, "compile", wrong)
    expect_uncompiled(monkeypatch, caplog, "gives other numbers")


def expect_uncompiled(monkeypatch, caplog, why):
    monkeypatch.setattr("kdloss.engine.at_once.AT_ONCE", 0)  # so that both modes work in blocks
    student, teacher = (x.float() for x in logits())
    results = []
    for mode in (True, False):
        switch.set_compile(mode)
        z = student.clone().requires_grad_()
        with caplog.at_level(logging.WARNING, "kdloss"):
            for _ in range(2):
                loss = VanillaKD()(z, teacher, LABELS)
        results.append((loss, *torch.autograd.grad(loss, z)))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert [why in record.message for record in caplog.records] == [True]  # one warning


@pytest.mark.parametrize(
    ("mode", "environment", "kind", "expected"),
    [
        (None, None, "cpu", False),
        (None, None, "cuda", True),
        (None, "1", "cpu", True),
        (None, "0", "cuda", False),
        (None, "auto", "cuda", True),
        (False, "1", "cpu", False),
        (True, "0", "cpu", True),
        ("auto", "1", "cpu", False),
    ],
)
def test_compilation_is_automatic_unless_the_environment_or_set_compile_says_otherwise(
    mode, environment, kind, expected, monkeypatch
):
    monkeypatch.delenv("KDLOSS_COMPILE", raising=False)
    if environment is not None:
        monkeypatch.setenv("KDLOSS_COMPILE", environment)
    if mode is not None:
        kdloss.set_compile(mode)
    assert switch.wanted(torch.device(kind)) is expected


def test_an_unknown_mode_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="\"auto\", True or False, got 'yes'"):
        kdloss.set_compile("yes")
    monkeypatch.setenv("KDLOSS_COMPILE", "yes")
    with pytest.raises(ValueError, match='KDLOSS_COMPILE is "auto", "1" or "0", got \'yes\''):
        VanillaKD()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long())
