"""Parity with other projects' losses: the same value and gradient, or theirs times a stated factor.

`make nightly` installs their packages in a separate environment. Tests of missing packages are skipped. All numbers are
float64, and all positions of a batch count unless labels say otherwise.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdloss
from kdloss import LazyLogits, distances, divergences

T = 3.0
N, C = 6, 5
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # about torch's own mean
LABELS = torch.tensor([0, 3, -100, 4, 2, 1])
EVERY_LABEL = LABELS.clamp_min(0)
Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    """Random tensors for a student and a teacher."""
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, *shape, dtype=torch.float64)
    return student.requires_grad_(), teacher


def same(ours: Loss, theirs: Loss, shape: tuple[int, ...], rtol: float = 1e-9) -> None:
    """Assert equal values and gradients."""
    student, teacher = drawn(*shape)
    values = [loss(student, teacher.clone()) for loss in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=rtol, atol=0)
    slopes = [torch.autograd.grad(value, student)[0] for value in values]
    torch.testing.assert_close(*slopes, rtol=rtol, atol=rtol * slopes[0].abs().max().item())


def alone(package: str, path: str) -> ModuleType:
    """Load one file of a package whose other imports are not needed here."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("alone", Path(found.origin).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entropy(teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The difference between a soft cross-entropy and the divergence, at every position."""
    p = (teacher / temperature).softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)


def mean(loss: Any, **options: Any) -> Loss:
    """The mean over positions."""
    return lambda s, t: loss(s, t, **options).mean()


# -- torchdistill --


def torchdistill(name: str, *args: Any, **options: Any) -> Any:
    """One of its losses, called with the outputs of the student's and the teacher's module."""
    module = pytest.importorskip("torchdistill.losses.mid_level", exc_type=ImportError)
    loss = getattr(module, name)(*args, **options)
    return lambda s, t, *more: loss({"m": {"output": s}}, {"m": {"output": t}}, *more)


ONE = {"p": {side: {"path": "m", "io": "output"} for side in ("student", "teacher")}}
IO = ("m", "output", "m", "output")


def test_torchdistill_s_kd_with_labels_is_vanilla_kd():
    theirs = torchdistill("KDLoss", *IO, temperature=T, alpha=0.3)
    ours = kdloss.VanillaKD(temperature=T, alpha=0.3)
    same(lambda s, t: ours(s, t, EVERY_LABEL), lambda s, t: theirs(s, t, EVERY_LABEL), (N, C))


def test_torchdistill_s_kd_without_labels_leaves_out_t_squared_and_its_mean_divides_by_the_classes():
    for reduction, factor in (("batchmean", 1 / T**2), ("mean", 1 / T**2 / C)):
        theirs = torchdistill("KDLoss", *IO, temperature=T, alpha=0.0, reduction=reduction)
        same(lambda s, t, f=factor: f * divergences.forward_kl(s, t, temperature=T).mean(), theirs, (N, C))


def test_torchdistill_s_standardised_kd_is_ours_without_t_squared():
    theirs = torchdistill("LogitStdKDLoss", *IO, temperature=T, alpha=0.0)
    ours = mean(divergences.standardized(divergences.forward_kl), temperature=T)
    same(lambda s, t: ours(s, t) / T**2, theirs, (N, C), rtol=1e-6)  # its epsilon is in another place


def test_torchdistill_s_dist_is_ours():
    theirs = torchdistill("DISTLoss", *IO, beta=2.0, gamma=0.5, tau=T)
    ours = mean(divergences.dist, temperature=T, beta=2.0, gamma=0.5)
    same(ours, theirs, (N, C), rtol=1e-6)


def maps(loss: Loss) -> Loss:
    """Turn a loss of maps into a loss of tokens [B, N, D]."""
    return lambda s, t: loss(distances.tokens(s), distances.tokens(t))


def test_torchdistill_s_attention_transfer_is_ours_in_both_forms():
    for paper, mode in ((False, "code"), (True, "paper")):
        theirs = torchdistill("ATLoss", ONE, mode=mode)
        same(maps(mean(distances.attention_transfer, paper=paper)), theirs, (3, 4, 5, 5))


def test_torchdistill_s_relations_of_examples_are_ours():
    rkd = {"student_output_path": "m", "teacher_output_path": "m", "reduction": "mean"}
    distance = torchdistill("RKDLoss", **rkd, dist_factor=1.0, angle_factor=0.0)
    same(mean(distances.rkd_distance), distance, (N, C))
    angle = torchdistill("RKDLoss", **rkd, dist_factor=0.0, angle_factor=1.0)
    same(mean(distances.rkd_angle), angle, (N, C))
    pkt = torchdistill("PKTLoss", *IO)
    same(mean(distances.pkt), pkt, (N, C), rtol=1e-4)  # it adds its epsilon after normalising


def test_torchdistill_s_similarity_divides_rows_by_their_l1_norm_where_the_paper_and_ours_take_l2():
    def by_norm(s: Tensor, t: Tensor, p: int) -> Tensor:
        return (F.normalize(s @ s.T, p=p) - F.normalize(t @ t.T, p=p)).square().mean()

    same(mean(distances.similarity), partial(by_norm, p=2), (N, C))
    same(torchdistill("SPKDLoss", "m", "m", reduction="batchmean"), partial(by_norm, p=1), (N, C))


def test_torchdistill_s_correlation_congruence_is_the_root_of_ours_on_unit_vectors():
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    theirs = torchdistill("CCKDLoss", "m", "m", kernel_config=kernel, reduction="batchmean")
    ours = mean(distances.correlation_congruence, gamma=0.4, order=2)
    same(lambda s, t: ours(s, t).sqrt() / N, lambda s, t: theirs(F.normalize(s), F.normalize(t)), (N, C))


def test_torchdistill_s_activation_boundary_sums_what_ours_averages():
    theirs = torchdistill("AltActTransferLoss", ONE, margin=0.7, reduction="mean")
    ours = maps(mean(distances.activation_boundary, margin=0.7))
    same(lambda s, t: 4 * 5 * 5 * ours(s, t), theirs, (3, 4, 5, 5))


def test_torchdistill_s_vid_is_ours_with_the_same_variance():
    loss = distances.VID(C, C).double()
    with torch.no_grad():
        variance = F.softplus(loss.alpha) + 1e-5
    theirs = torchdistill("VIDLoss", ONE)
    same(mean(loss), lambda s, t: theirs((s, variance.expand_as(s)), t), (N, C))


# -- trl --


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_s_generalised_jsd_is_ours_without_t_squared(beta):
    gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    labels = LABELS.reshape(2, 3)
    theirs = partial(gkd.GKDTrainer.generalized_jsd_loss, labels=labels, beta=beta, temperature=T)
    jsd = partial(divergences.jsd, beta=beta, t_squared=False)
    ours = kdloss.Sum(kdloss.Logits(jsd, temperature=T))
    for more in ({}, {"num_items_in_batch": 9}):
        same(lambda s, t, m=more: ours(s, t, labels, **m), partial(theirs, **more), (2, 3, C))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_s_chunked_divergence_of_heads_is_our_lazy_one_without_t_squared(beta):
    trainer = pytest.importorskip("trl.trainer.distillation_trainer", exc_type=ImportError)
    torch.manual_seed(1)
    head, other = torch.randn(2, 11, C)  # its kernel computes in float32
    labels = LABELS.reshape(2, 3)
    ours = kdloss.Sum(kdloss.Logits(partial(divergences.jsd, beta=beta, t_squared=False), temperature=T))

    def theirs(s: Tensor, t: Tensor) -> Tensor:
        given = (s.float(), t.float(), head, other, (labels != -100).long(), beta)
        value: Tensor = trainer._chunked_divergence_loss(*given, temperature=T)[0]
        return value.double()

    def lazily(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = ours(LazyLogits(s, head.double()), LazyLogits(t, other.double()), labels)
        return value

    same(lazily, theirs, (2, 3, C), rtol=1e-4)


# -- torchtune --


def torchtune(name: str, **options: Any) -> Loss:
    """One of its losses with labels; it computes in float32."""
    loss = getattr(alone("torchtune", "modules/loss/kd_losses.py"), name)(**options)
    return lambda s, t: loss(s, t, LABELS).double()


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_torchtune_s_kl_is_ours_and_the_forward_share_has_the_teacher_s_entropy_on_top(share):
    forward = kdloss.Logits(divergences.forward_kl, name="forward_kl")
    ours = share * forward + (1 - share) * kdloss.Logits(divergences.reverse_kl, name="reverse_kl")

    def more(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = ours(s, t, LABELS) + share * entropy(t)[LABELS != -100].mean()
        return value

    same(more, torchtune("SymmetricKLLoss", sym_kd_ratio=share), (N, C), rtol=1e-5)
    if share in (0, 1):
        same(more, torchtune("ForwardKLLoss" if share else "ReverseKLLoss"), (N, C), rtol=1e-5)


def test_torchtune_s_chunks_have_the_value_of_the_whole_and_no_number_where_no_label_counts():
    for name in ("ForwardKL", "ReverseKL", "SymmetricKL"):
        whole, labels = torchtune(f"{name}Loss"), LABELS.unsqueeze(0)
        loss = getattr(alone("torchtune", "modules/loss/kd_losses.py"), f"{name}WithChunkedOutputLoss")(3)

        def chunked(s: Tensor, t: Tensor, loss: Any = loss, labels: Tensor = labels) -> Tensor:
            value: Tensor = loss(*([x.unsqueeze(0) for x in z.chunk(3)] for z in (s, t)), labels)
            return value.double()

        same(whole, chunked, (N, C), rtol=1e-5)
        student, teacher = drawn(1, N, C)
        nothing = loss(list(student.chunk(3, 1)), list(teacher.chunk(3, 1)), torch.full_like(labels, -100))
        assert nothing.isnan() == (name != "ForwardKL")


def test_torchtune_s_forward_kl_leaves_out_a_class_that_the_student_excludes_where_kl_is_infinite():
    student, teacher = drawn(N, C)
    student = student.detach().clone()
    student[:, 1] = -torch.inf
    assert torchtune("ForwardKLLoss")(student, teacher).isfinite()
    assert divergences.forward_kl(student, teacher).isinf().all()


# -- TextBrewer --


def textbrewer(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of its losses, loaded without its trainers, which need TensorBoard."""
    found = importlib.util.find_spec("textbrewer")
    if found is None or found.origin is None:
        pytest.skip("textbrewer is not installed")
    package = ModuleType("textbrewer")
    package.__path__, package.__spec__ = [str(Path(found.origin).parent)], found
    monkeypatch.setitem(sys.modules, "textbrewer", package)
    with warnings.catch_warnings(action="ignore"):  # about backslashes in its docstrings
        return getattr(importlib.import_module("textbrewer.losses"), name)


def test_textbrewer_s_soft_cross_entropy_is_ours_without_t_squared_and_with_the_teacher_s_entropy(monkeypatch):
    theirs = partial(textbrewer("kd_ce_loss", monkeypatch), temperature=T)
    ours = mean(divergences.forward_kl, temperature=T, t_squared=False)
    same(lambda s, t: ours(s, t) + entropy(t, T).mean(), theirs, (N, C))
    mse = partial(textbrewer("kd_mse_loss", monkeypatch), temperature=T)
    same(lambda s, t: divergences.logit_mse(s, t).mean() / T**2, mse, (N, C))


def test_textbrewer_s_losses_of_hidden_states_are_ours_but_fsp_which_is_a_mean(monkeypatch):
    mask = torch.tensor([[True, True, True, False], [True] * 4])

    def counted(distance: Any) -> Loss:
        return lambda s, t: kdloss.reduce(distance(s, t), mask)

    for name, distance in (("hid_mse_loss", distances.mse), ("cos_loss", distances.cosine)):
        theirs = partial(textbrewer(name, monkeypatch), mask=mask)
        same(counted(distance), theirs, (2, 4, C))
    pkd = textbrewer("pkd_loss", monkeypatch)
    same(lambda s, t: distances.pkd(s[:, 0], t[:, 0]).mean(), pkd, (2, 4, C))
    fsp = textbrewer("fsp_loss", monkeypatch)
    same(mean(distances.fsp), lambda s, t: C**2 * fsp(s.split(C, -1), t.split(C, -1)), (2, 4, 2 * C))


# -- NeMo AutoModel --


def test_nemo_automodel_s_kd_is_forward_kl_with_t_squared():
    loss = alone("nemo_automodel", "components/loss/kd_loss.py").KDLoss(temperature=T)
    ours = 1.0 * kdloss.Logits(temperature=T)
    for theirs, more in (({}, {}), ({"num_batch_labels": 9}, {"num_items_in_batch": 9})):
        same(
            lambda s, t, m=more: ours(s, t, LABELS, **m),
            lambda s, t, m=theirs: loss(s, t, LABELS, **m).double(),
            (N, C),
            rtol=1e-5,
        )


# -- Liger --


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_liger_s_fused_head_is_our_lazy_one_without_t_squared(beta):
    liger = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    theirs = liger.LigerFusedLinearJSDLoss(0.4, 0.6, beta=beta, temperature=T, compiled=False, chunk_size=2)
    jsd = partial(divergences.jsd, beta=beta, t_squared=False)
    ours = 0.4 * kdloss.CrossEntropy() + 0.6 * kdloss.Logits(jsd, temperature=T)
    torch.manual_seed(1)
    head, other = torch.randn(2, 11, C).double()
    weights = [head.clone().requires_grad_() for _ in range(2)]

    def lazily(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = ours(LazyLogits(s, weights[0]), LazyLogits(t, other), LABELS)
        return value

    def chunked(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = theirs(s, weights[1], t, other, LABELS)
        return value.double()

    same(lazily, chunked, (N, C), rtol=1e-5)  # its cross-entropy is computed in float32
    for loss in (lazily, chunked):
        loss(*drawn(N, C)).backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-5, atol=1e-6)


# -- sentence-transformers --


@pytest.mark.parametrize(("metric", "ours"), [("mse", distances.mse), ("cosine", distances.cosine)])
def test_sentence_transformers_embeddings_are_compared_as_ours(metric, ours):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", exc_type=ImportError)
    loss = losses.EmbedDistillLoss(nn.Identity(), distance_metric=metric)
    same(mean(ours), lambda s, t: loss.compute_loss_from_embeddings([s], [t]), (N, C))


def test_sentence_transformers_kl_of_scores_is_forward_kl_with_t_squared():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", exc_type=ImportError)
    loss = losses.DistillKLDivLoss(nn.Identity(), temperature=T)
    query = torch.ones(N, 1, dtype=torch.float64)  # so the score of a passage is the passage itself

    def theirs(s: Tensor, t: Tensor) -> Tensor:
        value: Tensor = loss.compute_loss_from_embeddings([query, *s.unsqueeze(-1).unbind(1)], t)
        return value

    same(mean(divergences.forward_kl, temperature=T), theirs, (N, C))


# -- timm --


def test_timm_s_cross_entropies_are_ours():
    timm = alone("timm", "loss/cross_entropy.py")
    smooth = timm.LabelSmoothingCrossEntropy(0.2)
    ours = 1.0 * kdloss.CrossEntropy(label_smoothing=0.2)
    same(lambda s, t: ours(s, None, EVERY_LABEL), lambda s, t: smooth(s, EVERY_LABEL), (N, C))
    soft = timm.SoftTargetCrossEntropy()
    ours = 1.0 * kdloss.CrossEntropy()
    same(lambda s, t: ours(s, None, t.softmax(-1)), lambda s, t: soft(s, t.softmax(-1)), (N, C))


# -- torch --


def test_torch_s_batchmean_is_ours_and_its_mean_divides_by_the_classes_too():
    def theirs(s: Tensor, t: Tensor, reduction: str) -> Tensor:
        return F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction=reduction)

    for reduction, factor in (("batchmean", 1), ("mean", 1 / C)):
        ours = mean(divergences.forward_kl, temperature=T, t_squared=False)
        same(lambda s, t, f=factor, o=ours: f * o(s, t), partial(theirs, reduction=reduction), (N, C))
