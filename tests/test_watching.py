"""`never_waiting` detects what would wait for an accelerator, and no training step of the engine does."""

from types import SimpleNamespace

import losses
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
from kdloss import CrossEntropy, LazyLogits, Mixture, TokenMap, TopKLogits, VanillaKD, divergences
from kdloss.terms._ahead import Ahead
from kdloss.weighting import confidence, entropy

X = torch.arange(6.0)
MASK = X > 2
WAITING = {
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
NOT_WAITING = {
    "arithmetic": lambda x: F.cross_entropy(x.view(2, 3), x[:2].long()),
    "filled by a mask": lambda x: x.clone().__setitem__(x > 2, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 2, 0),
    "full": lambda x: torch.full((2,), 3.0) + torch.zeros(2).fill_(1),
    "an index of numbers": lambda x: x[torch.arange(2)],
    "a slice": lambda x: x[1:, None],
    "repeats of a stated sum": lambda x: x.repeat_interleave(torch.ones(6).long(), output_size=6),
    "to another device without waiting": lambda x: x.to("meta", non_blocking=True),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "as_tensor of a tensor": lambda x: torch.as_tensor(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_an_operation_that_would_wait_is_refused(name):
    with pytest.raises(Waited), never_waiting():
        WAITING[name](X)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_an_operation_that_would_not_wait_is_allowed(name):
    with never_waiting():
        NOT_WAITING[name](X)


def test_waiting_inside_an_autograd_function_or_its_backward_is_refused():
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


def test_may_wait_allows_one_function_to_read_numbers_on_the_host(monkeypatch):
    with pytest.raises(Waited), never_waiting():
        count(X)
    may_wait(monkeypatch, f"{__name__}.count")
    with never_waiting():
        assert count(X) == 15


# -- the engine --


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4).to(dtype), torch.randn(2, 6, 4).to(dtype)
    heads = [torch.randn(11, 4).to(dtype) for _ in range(2)]
    labels = torch.randint(11, (2, 6))
    labels[0, :2] = -100
    return LazyLogits(student.requires_grad_(), heads[0].requires_grad_()), LazyLogits(teacher, heads[1]), labels


SHARED = TokenMap(torch.arange(9), torch.arange(1, 10))
REVERSE = kdloss.Logits(divergences.reverse_kl, name="second")
WEIGHED = CrossEntropy(label_smoothing=0.1, class_weights=torch.rand(11))
SOFT = torch.rand(2, 6, 11).softmax(-1)
MASKED = {"mask": torch.arange(12).view(2, 6) != 7}
RISING = kdloss.schedules.linear(0.1, 1.0, steps=10)
STEPS = {  # criterion, whether both logits are dense, a function of the teacher's logits, more arguments of the call
    "logits": (VanillaKD(), True, None, {}),
    "causal logits": (VanillaKD(causal=True), True, None, MASKED),
    "JSD": (VanillaKD(divergence=divergences.jsd), True, None, {}),
    "by autograd": (VanillaKD(divergence=divergences.adaptive_kl), True, None, MASKED),
    "no labels": (kdloss.Sum(kdloss.Logits()), True, None, {"labels": None} | MASKED),
    "soft labels": (VanillaKD(), True, None, {"labels": SOFT} | MASKED),
    "class weights": (
        CrossEntropy(label_smoothing=0.1, class_weights=torch.rand(11)) + REVERSE,
        True,
        None,
        {"num_items_in_batch": torch.tensor(9)},
    ),
    "overwritten": (VanillaKD(overwrite_logits=True), True, None, {}),
    "top-k": (VanillaKD(1.0), True, lambda t: TopKLogits.of(t, 3), {}),
    "stored top-k": (
        VanillaKD(),
        False,
        lambda t: TopKLogits(torch.arange(3).expand(2, 6, 3), SOFT[..., :3].log()),
        {},
    ),
    "lazy": (VanillaKD(), False, None, {}),
    "mixture": (VanillaKD(), False, lambda t: Mixture([t, t]), {}),
    "token map": (VanillaKD(vocabulary=SHARED), False, None, {}),
    "two terms": (VanillaKD() + 0.5 * REVERSE, False, None, {}),
    "learned and scheduled": (nn.Parameter(torch.ones(())) * CrossEntropy() + RISING * REVERSE, False, None, {}),
    "by the mask": (CrossEntropy() + kdloss.Logits(positions="mask"), False, None, MASKED),
    "padding on the left": (VanillaKD(causal=True), False, None, {"attention_mask": MASKED["mask"]}),
    "weighted by confidence": (CrossEntropy() + confidence * (kdloss.Logits() + REVERSE), False, None, {}),
    "weighted causal values": (
        kdloss.Sum(entropy * kdloss.Logits(), causal=True, reduction="none"),
        True,
        None,
        MASKED,
    ),
    "learned weights": (kdloss.weighting.Learned(1) * kdloss.Logits(), False, None, {}),
    "trained balance": (kdloss.Sum(VanillaKD(), balance=kdloss.balancing.Uncertainty()), False, None, {}),
    "running balance": (kdloss.Sum(VanillaKD(), balance=kdloss.balancing.RunningMagnitude()), True, None, {}),
    "values": (VanillaKD(reduction="none"), False, None, {}),
    "causal values": (VanillaKD(reduction="none", causal=True), True, None, MASKED),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_no_accelerator(name, dtype, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    criterion, dense, of_teacher, more = STEPS[name]
    student, teacher, labels = inputs(dtype)
    teacher = teacher.dense() if dense else teacher
    teacher = teacher if of_teacher is None else of_teacher(teacher)

    def step():
        criterion(student.dense() if dense else student, teacher, **{"labels": labels} | more).sum().backward()
        criterion.advance()

    step()  # the first step may read its inputs on the host
    with never_waiting():
        step()


@pytest.mark.parametrize("loss", losses.DISTANCES, ids=str)
def test_a_distance_of_features_waits_for_no_accelerator(loss, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    student, teacher = loss.sample(3, 6, 8)
    mask = torch.arange(18).view(3, 6) % 5 > 0

    def step():
        kdloss.masked(loss.bare(student), student, teacher, mask).backward()

    step()
    with never_waiting():
        step()


class LanguageModel(nn.Module):
    """A plain language model; models of transformers may read their masks on the host."""

    def __init__(self, width):
        super().__init__()
        self.read, self.block, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, 11)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.block(self.read(input_ids)).tanh())}


REVERSED = TokenMap(torch.arange(11), torch.arange(11).flip(0))
SUMS = {
    "KD": VanillaKD(causal=True),
    "not causal": VanillaKD(causal=False),
    "KD alone": kdloss.Sum(kdloss.Logits(), causal=True),
    "features": kdloss.FeatureKD(layers=["block"], pairing="same", logit_weight=0.5, causal=True),
    "token map": VanillaKD(causal=True, vocabulary=REVERSED),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_step_of_models_waits_for_no_accelerator(name, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    ids = torch.randint(11, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][1, 4:], batch["attention_mask"][1, 4:] = -100, 0
    model = kdloss.Distillation(LanguageModel(6), LanguageModel(8), SUMS[name]).prepare(**batch)

    def step(**more):
        model(**batch, **more).loss.backward()

    items = torch.tensor(5)
    step()
    with never_waiting():
        step()
        step(num_items_in_batch=items)


def test_a_classifiers_step_waits_for_no_accelerator(monkeypatch):
    as_on_an_accelerator(monkeypatch)
    teacher, student = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 5)) for n in (8, 6))
    distill = kdloss.Distiller(teacher, VanillaKD())
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, -100, 4, 0])

    def step():
        distill(student, x, labels=labels).loss.backward()

    step()
    with never_waiting():
        step()


def test_decoder_labels_are_mapped_to_the_teachers_vocabulary_without_waiting(monkeypatch):
    as_on_an_accelerator(monkeypatch)
    model, labels = nn.Module(), torch.tensor([[3, -100], [10, 0]])
    model.config = SimpleNamespace(is_encoder_decoder=True)
    REVERSED.to_teacher(labels.clamp_min(0))
    with never_waiting():
        mapped = kdloss._inputs.of_decoder(model, labels, REVERSED.to_teacher)
    assert mapped.tolist() == [[7, -100], [0, 10]]


def test_a_token_map_checks_for_missing_tokens_on_an_accelerator_only_in_its_first_call(monkeypatch):
    as_on_an_accelerator(monkeypatch)
    shared = TokenMap(torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match="no counterpart"):
        shared.to_teacher(torch.tensor([0, 5]))
    tokens = torch.tensor([1, 0])
    with never_waiting():
        mapped = shared.to_teacher(tokens)
    assert mapped.tolist() == [1, 0]


def test_stored_teacher_outputs_move_to_the_device_without_waiting():
    stored = TopKLogits.of(torch.randn(2, 3, 9), 4)
    with never_waiting():
        moved = kdloss.teacher.moved({"teacher": stored}, "meta")["teacher"]
    assert [x.device.type for x in (moved.indices, moved.log_probs, moved.log_rest)] == ["meta"] * 3


# -- rows that do not count, on a device where the host cannot look for them --


def plain(hidden, weight, teacher, labels, keep):
    """KL + CE (T = 2, alpha = 0.5) of only the positions that count, and its gradients, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    z, t, y = (hidden @ weight.T)[keep], teacher.dense().double()[keep], labels[keep]
    kl = 4 * (F.softmax(t / 2, -1) * (F.log_softmax(t / 2, -1) - F.log_softmax(z / 2, -1))).sum(-1)
    loss = (F.cross_entropy(z, y, reduction="none") + kl).mean() / 2
    return loss, torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("number", ["unknown", "exact", "upper bound"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_nan_in_rows_that_do_not_count_changes_neither_loss_nor_gradients(dense, causal, number, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    rows, fused = [], kdloss.terms._sweep.fused
    monkeypatch.setattr(kdloss.terms._sweep, "fused", lambda *x: rows.append(x[0].rows) or fused(*x))
    student, teacher, labels = inputs()
    labels[1, -2:] = -100
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, 1] = number == "exact"
    counts = (labels != -100) & mask
    keep = torch.cat([counts[:, 1:], torch.zeros(2, 1).bool()], 1) if causal else counts
    of = torch.cat([labels[:, 1:], labels[:, :1]], 1) if causal else labels
    expected, (of_hidden, of_weight) = plain(student.hidden, student.weight, teacher, of, keep)

    hidden = student.hidden.detach().masked_fill(~keep.unsqueeze(-1), torch.nan).requires_grad_()
    taught = LazyLogits(teacher.hidden.masked_fill(~keep.unsqueeze(-1), torch.inf), teacher.weight)
    ahead = None if number == "unknown" else Ahead.of(labels, None, causal=causal, ignore_index=-100)
    criterion = VanillaKD(causal=causal)
    if dense:
        z = LazyLogits(hidden, student.weight).dense().detach().requires_grad_()
        loss = criterion(z, taught.dense(), labels, mask=mask, ahead=ahead)
        (slope,) = torch.autograd.grad(loss, z)
        assert (slope[~keep] == 0).all()
        gradients = slope.double() @ student.weight.double(), slope[keep].T.double() @ student.hidden[keep].double()
    else:
        loss = criterion(LazyLogits(hidden, student.weight), taught, labels, mask=mask, ahead=ahead)
        gradients = torch.autograd.grad(loss, (hidden, student.weight))
        assert (gradients[0][~keep] == 0).all()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, slope in zip(gradients, (of_hidden, of_weight), strict=True):
        assert (ours - slope).norm() <= 1e-5 * slope.norm()
    swept_rows = {"unknown": 10 if causal else 12, "exact": keep.sum(), "upper bound": keep.sum() + 1}
    assert rows == [swept_rows[number]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_of_rows_that_do_not_count_are_zero(masked, causal, monkeypatch):
    """The criterion knows an upper bound of the number of rows that count."""
    as_on_an_accelerator(monkeypatch)
    student, teacher, labels = inputs()
    mask = torch.arange(12).view(2, 6) != (7 if masked else 12)
    keep = ((labels != -100) & mask)[:, int(causal) :]
    z, t = (x.dense().detach()[:, : keep.shape[1]] for x in (student, teacher))
    kl = F.kl_div(z.double().log_softmax(-1), t.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    logits = student.dense().detach().requires_grad_()
    ahead = Ahead.of(labels, mask if masked else None, causal=causal, ignore_index=-100)
    criterion = kdloss.Sum(kdloss.Logits(), causal=causal, reduction="none")
    values = criterion(logits, teacher.dense(), labels, mask=mask, ahead=ahead)
    values.sum().backward()
    assert torch.allclose(values.double(), kl.where(keep, 0), atol=1e-6)
    slope = (z.softmax(-1) - t.softmax(-1)) * keep.unsqueeze(-1)
    assert torch.allclose(logits.grad[:, : keep.shape[1]], slope, atol=1e-6)


def test_the_number_of_counted_rows_is_requested_before_the_models_run_and_read_after(monkeypatch):
    as_on_an_accelerator(monkeypatch)
    happened, sweep = [], kdloss.terms._sweep.fused
    asked, read = Ahead.of.__func__, kdloss.terms._ahead.landed
    monkeypatch.setattr(Ahead, "of", classmethod(lambda *x, **y: happened.append("asked") or asked(*x, **y)))
    monkeypatch.setattr(kdloss.terms._ahead, "landed", lambda *x: happened.append("read") or read(*x))
    monkeypatch.setattr(kdloss.terms._sweep, "fused", lambda *x: happened.append(x[0].rows) or sweep(*x))
    student, teacher = nn.Linear(4, 5), nn.Linear(4, 5)
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda *_, name=name: happened.append(name))
    labels = torch.tensor([0, -100, 3])
    kdloss.Distiller(teacher, VanillaKD())(student, torch.randn(3, 4), labels=labels)
    assert happened == ["asked", "student", "teacher", "read", 2]


# -- bytes --


def moved(step, size):
    return bytes_moved(step, size) / size


@since_torch(2, 10)
def test_bytes_moved_are_what_operators_read_and_write():
    x, y, out = torch.randn(3, 64, 100)
    size = x.numel()
    assert moved(lambda: x + y, size) == 12
    assert moved(lambda: x.mul_(2), size) == 8
    assert moved(lambda: torch.add(x, y, out=out), size) == 12  # the old content of `out` is not read
    assert moved(lambda: out.copy_(x), size) == 8
    assert moved(lambda: x.bfloat16(), size) == 6
    assert moved(lambda: x.sum(), size) == pytest.approx(4, abs=0.01)
    assert moved(lambda: x + y[:1].expand(64, 100), size) == pytest.approx(8, abs=0.1)
    assert moved(lambda: x.view(100, 64).T[1:], size) == 0
    assert moved(lambda: torch.empty(64, 100), size) == 0
    assert moved(lambda: x.scatter_add_(-1, torch.zeros(64, 1).long(), torch.ones(64, 1)), size) < 0.5
    assert moved(lambda: x[:1] + 1, size) == 0  # too small to be counted


@since_torch(2, 10)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_bytes_moved_of_a_compiled_function_are_its_inputs_and_outputs():
    x, y = torch.randn(2, 16, 2000)
    several = torch.compile(lambda a, b: (a + 2 * b).softmax(-1))
    assert moved(lambda: several(x, y) + 1, x.numel()) == 12 + 8  # 8 for the operator outside
    assert x.nbytes <= measure.peak(lambda: several(x, y)) < 1.01 * x.nbytes
