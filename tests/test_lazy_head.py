"""Lazy logits: the loss and gradients of full logits without computing them, or a logged reason for computing them."""

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lazy_head_processes as processes
import pytest
import torch
import transformers as hf
from families import CAUSAL, FAMILIES, VOCAB, _decoder, batch, build, checkpointing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import since_torch

import kdloss
from kdloss._shaping import shaping, signal_like

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")

MORE = {
    "gemma3 softcapped": _decoder(hf.Gemma3TextConfig, final_logit_softcapping=5.0),
    "cohere": _decoder(hf.CohereConfig, logit_scale=0.0625),
    "granite": _decoder(hf.GraniteConfig, logits_scaling=6.0),  # divides
    "phi": _decoder(hf.PhiConfig),  # a head with a bias
}
SHAPING = {
    "gemma2": {"softcap": 30.0, "scale": 1.0},
    "gemma3 softcapped": {"softcap": 5.0, "scale": 1.0},
    "cohere": {"softcap": None, "scale": 0.0625},
    "granite": {"softcap": None, "scale": 1 / 6},
}
if hasattr(hf, "HyperCLOVAXConfig"):  # since transformers 5
    MORE["hyperclovax"] = _decoder(hf.HyperCLOVAXConfig, logits_scaling=6.0)  # multiplies
    SHAPING["hyperclovax"] = {"softcap": None, "scale": 6.0}


def model(family, seed=0, depth=2, dtype=torch.float64):
    """A random model with weights so large that soft caps bite."""
    if family in FAMILIES:
        made = build(family, depth=depth, seed=seed)
    else:
        torch.manual_seed(seed)
        made = hf.AutoModelForCausalLM.from_config(MORE[family](16, depth))
    with torch.no_grad():
        head = made.get_output_embeddings()
        head.weight.mul_(40)
        if head.bias is not None:
            head.bias.normal_()
    return made.eval().to(dtype)


def without_labels(family):
    return {name: x for name, x in batch(family).items() if name != "labels"}


def loss_and_gradients_of_full_logits(criterion, student, teacher, family="llama"):
    """The loss, and its gradients, from the logits that the models return when called directly."""
    with torch.no_grad():
        target = teacher(**without_labels(family)).logits
    inputs = batch(family)
    loss = criterion(
        student(**without_labels(family)).logits, target, inputs["labels"], mask=inputs["attention_mask"].bool()
    )
    return loss, gradients(loss, student)


def gradients(loss, student):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_close(found, expected, rel):
    """Assert a small relative error of each tensor; a tiny one (a key's bias) is compared with the largest norm."""
    assert found.keys() == expected.keys()
    floor = max(g.norm() for g in expected.values()) * 1e-3
    for name, g in expected.items():
        assert (found[name] - g).norm() <= rel * max(g.norm(), floor), name


def is_lazy(out):
    return isinstance(out.output.logits, kdloss.LazyLogits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*CAUSAL, *MORE])
def test_loss_and_every_gradient_are_those_of_full_logits(family, dtype):
    student, teacher = model(family, dtype=dtype), model(family, seed=1, dtype=dtype)
    rel = 1e-10 if dtype == torch.float64 else 1e-5
    for alpha in (0.0, 0.5, 1.0):
        criterion = kdloss.VanillaKD(alpha=alpha, causal=True)
        expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher, family)
        distill = kdloss.Distiller(teacher, criterion)
        for _ in range(2):  # the first pass measures what the model does to its logits
            out = distill(student, **batch(family))
            assert is_lazy(out)
            assert out.loss.item() == pytest.approx(expected.item(), rel=rel)
            assert_close(gradients(out.loss, student), grads, rel)


@pytest.mark.parametrize("family", [*CAUSAL, *MORE])
def test_what_a_model_does_to_its_logits_is_measured(family):
    student = model(family)
    out = kdloss.Distiller(copy.deepcopy(student), kdloss.VanillaKD())(student, **batch(family))
    lazy = out.output.logits
    found = {"softcap": lazy.softcap, "scale": pytest.approx(lazy.scale, rel=1e-14)}
    assert found == SHAPING.get(family, {"softcap": None, "scale": 1.0})
    torch.testing.assert_close(out.logits, student(**without_labels(family)).logits, rtol=1e-12, atol=1e-12)


def test_after_the_first_pass_a_models_hooks_see_the_logits_of_the_first_position_only():
    student, seen = model("granite"), []
    distill = kdloss.Distiller(student, kdloss.VanillaKD(alpha=1.0))
    student.register_forward_hook(lambda m, a, out: seen.append(out.logits))
    for _ in range(2):
        distill(student, **batch("granite"))
    last = seen[-1]
    expected = student(**without_labels("granite")).logits[:1, :1]
    torch.testing.assert_close(last, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [9, 61, 5000])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda z: z, (None, 1.0)),
        (lambda z: z.float(), (None, 1.0)),
        (lambda z: z.bfloat16(), (None, 1.0)),
        (lambda z: z / 3, (None, 1 / 3)),
        (lambda z: 20 * (z / 20).tanh(), (20.0, 1.0)),
        (lambda z: 20 * (z * 0.1 / 20).tanh(), (20.0, 0.1)),
        (lambda z: 0.1 * 200 * (z / 200).tanh(), (20.0, 0.1)),
        (lambda z: z + 1, None),
        (lambda z: z.relu(), None),
        (lambda z: z.clamp(-9, 9), None),
        (lambda z: z.log_softmax(-1), None),
        (lambda z: 20 * (z.float() / 20).tanh(), (20.0, 1.0)),
        (lambda z: z.index_fill(-1, torch.tensor([1]), -1e9), None),
        (lambda z: z * 0, None),
        (lambda z: z * float("nan"), None),
    ],
)
def test_scale_and_soft_cap_are_recognised_and_nothing_else(change, found, vocabulary):
    signal = signal_like(torch.zeros(1, 1, vocabulary))
    answer = shaping(signal, change(signal))
    if found is None:
        assert answer is None
    else:
        cap, scale = found
        assert answer == {
            "softcap": None if cap is None else pytest.approx(cap, rel=1e-6),
            "scale": pytest.approx(scale, rel=1e-6),
        }


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_features_term_works_with_lazy_logits(family):
    student, teacher = model(family), model(family, seed=1, depth=4)
    criterion = kdloss.FeatureKD("all", logit_weight=0.7, causal=True).prepare(student, teacher)
    inputs = batch(family)
    with torch.no_grad(), kdloss.capture(teacher, [0, 3]) as t:
        teacher(**without_labels(family))
    with kdloss.capture(student, [0, 1]) as s:
        student(**without_labels(family))
    expected = criterion(s, t, inputs["labels"], mask=inputs["attention_mask"].bool())
    grads = gradients(expected, student)
    out = kdloss.Distiller(teacher, criterion)(student, **inputs)
    assert is_lazy(out)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_close(gradients(out.loss, student), grads, 1e-10)


class Largest(TorchDispatchMode):
    """Record the largest storage, in elements, of any tensor that an operator returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.dtype.itemsize)
        return out


def test_no_tensor_of_the_size_of_the_logits_is_ever_allocated():
    vocab, b, t = 32_000, 4, 384
    shape = {"vocab_size": vocab, "n_head": 2, "n_positions": t, "bos_token_id": 0, "eos_token_id": 1}
    student, teacher = (hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=width, **shape)) for width in (8, 16))
    tokens = torch.randint(vocab, (b, t))
    with Largest() as full, torch.no_grad():
        teacher(tokens)
    assert full.entries == b * t * vocab  # full logits are seen by this measurement
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    for _ in range(2):
        with Largest() as lazy:
            distill(student, input_ids=tokens, labels=tokens).loss.backward()
        assert lazy.entries <= b * t * vocab / 3


def lora(student, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(target_modules=["q_proj"], **settings)
    return get_peft_model(student, config).double()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns
@pytest.mark.parametrize("trained", [None, ["lm_head"]])
def test_peft_students_have_lazy_logits_with_and_without_their_adapters(trained):
    student, teacher = lora(model("llama"), modules_to_save=trained), model("llama", seed=1)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:  # as after some training
                p.add_(torch.randn_like(p), alpha=0.1)
    criterion = kdloss.VanillaKD(causal=True)
    distill = kdloss.Distiller(teacher, criterion)
    expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    out = distill(student, **batch("llama"))
    assert is_lazy(out)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    found = gradients(out.loss, student)
    assert_close(found, grads, 1e-10)
    assert any("lm_head" in name for name in found) == (trained is not None)
    with student.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(distill(student, **batch("llama")).logits, student(**without_labels("llama")).logits)
    assert is_lazy(distill(student, **batch("llama")))  # the pass without adapters doesn't affect the next one


class MasksForCausalLM(hf.LlamaForCausalLM):
    """A model that gives one token a very low logit."""

    def forward(self, *args, **inputs):
        out = super().forward(*args, **inputs)
        out.logits = out.logits.index_fill(-1, torch.tensor([7]), -50.0)
        return out


class CutsForCausalLM(hf.LlamaForCausalLM):
    """A model that cuts the padding of its vocabulary off its logits."""

    def forward(self, *args, **inputs):
        out = super().forward(*args, **inputs)
        out.logits = out.logits[..., :-2]
        return out


class TrainedScaleForCausalLM(hf.LlamaForCausalLM):
    """A model that trains the scale of its logits."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, *args, **inputs):
        out = super().forward(*args, **inputs)
        out.logits = out.logits * self.scale
        return out


class InPlaceForCausalLM(TrainedScaleForCausalLM):
    """The same in place."""

    def forward(self, *args, **inputs):
        out = hf.LlamaForCausalLM.forward(self, *args, **inputs)
        out.logits.mul_(self.scale)
        return out


class TwiceForCausalLM(hf.LlamaForCausalLM):
    """A model that applies its head to an earlier layer as well."""

    def forward(self, *args, **inputs):
        out = super().forward(*args, output_hidden_states=True, **inputs)
        out.logits = out.logits + 0.5 * self.lm_head(out.hidden_states[1])
        return out


class Scaled(nn.Linear):
    """A head that scales the output of its linear map."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_head(student, change):
    student.set_output_embeddings(change(student.get_output_embeddings()))
    return student


def like(kind):
    torch.manual_seed(3)
    return kind(model("llama").config).eval().double()


def scaled(head):
    other = Scaled(head.in_features, head.out_features, bias=False).double()
    other.weight = head.weight
    return other


def hooked(head):
    head.register_forward_hook(lambda m, a, z: z * 2)
    return head


def patched(head):
    head.forward = lambda x: 2 * nn.functional.linear(x, head.weight)
    return head


def partitioned(head):
    head.weight.ds_id = 3
    return head


def compiled_in_place(student):
    student.compile(backend="eager")
    return student


def a_copy(student):
    with torch.no_grad():
        lora(student, modules_to_save=["lm_head"]).get_output_embeddings().modules_to_save["default"].weight.mul_(0.5)


def another_adapter(student):
    from peft import LoraConfig

    student.add_adapter("second", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    student.double().set_adapter("second")
    with torch.no_grad():
        student.get_output_embeddings().modules_to_save["second"].weight.mul_(0.5)


def other_linear(bias):
    return lambda head: nn.Linear(head.in_features, head.out_features, bias).double()


CHANGES = {  # a student, and what happens to its head after some steps
    "peft trains a copy": (model, a_copy),
    "another adapter": (lambda family: lora(model(family), modules_to_save=["lm_head"]), another_adapter),
    "another head": (model, lambda student: with_head(student, other_linear(bias=False))),
    "a head with a bias": (model, lambda student: with_head(student, other_linear(bias=True))),
    "more tokens": (model, lambda student: student.resize_token_embeddings(70)),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns
@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_changes_between_steps_is_found_where_it_is_now(change):
    make, then = CHANGES[change]
    student, teacher = make("llama"), model("llama", seed=1)
    terms = [kdloss.CrossEntropy(), *([] if change == "more tokens" else [kdloss.Logits(temperature=2.0)])]
    criterion = kdloss.Sum(*terms, causal=True)
    distill = kdloss.Distiller(teacher, criterion)
    before = [distill(student, **batch("llama")).loss.item() for _ in range(2)]
    then(student)
    expected, grads = loss_and_gradients_of_full_logits(criterion, student.double(), teacher)
    out = distill(student, **batch("llama"))
    assert is_lazy(out)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10) != before[1]
    assert_close(gradients(out.loss, student), grads, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "phi", *SHAPING])
def test_a_model_that_does_the_same_as_before_makes_one_pass(family, dtype):
    student, passes = model(family, dtype=dtype), []
    distill, tokens = kdloss.Distiller(None, kdloss.Sum(kdloss.CrossEntropy(), causal=True)), batch(family)
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    distill(student, **tokens)
    for mode in torch.no_grad, torch.enable_grad, torch.inference_mode:
        passes.clear()
        with mode(), torch.autocast("cpu", enabled=dtype == torch.float32):
            for scale in 1.0, 1e-3, 1e3:
                with torch.no_grad():
                    student.get_output_embeddings().weight.mul_(scale)
                assert is_lazy(distill(student, **tokens))
                with torch.no_grad():
                    student.get_output_embeddings().weight.div_(scale)
        assert len(passes) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("family", "setting", "values"),
    [
        ("gemma2", "final_logit_softcapping", [30.0, 10.0, None, 30.0]),
        ("granite", "logits_scaling", [6.0, 1.0, 6.1]),
        ("cohere", "logit_scale", [0.0625, 0.06, 1.0]),
    ],
)
def test_what_a_model_does_to_its_logits_may_change_between_steps(family, setting, values, dtype):
    student, teacher = (model(family, seed, dtype=dtype) for seed in (0, 1))
    criterion, rel = kdloss.VanillaKD(causal=True), 1e-10 if dtype == torch.float64 else 1e-4
    distill = kdloss.Distiller(teacher, criterion)
    for value in values:
        for owner in (student.config, student):  # Cohere and Granite read their own attribute
            if hasattr(owner, setting):
                setattr(owner, setting, value)
        expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher, family)
        for _ in range(2):
            out = distill(student, **batch(family))
            assert is_lazy(out)
            assert out.loss.item() == pytest.approx(expected.item(), rel=rel)
            assert_close(gradients(out.loss, student), grads, rel)


@pytest.mark.parametrize("kind", [TrainedScaleForCausalLM, InPlaceForCausalLM])
def test_a_scale_may_change_between_steps_and_be_trained_later(kind):
    student, teacher, criterion = like(kind), model("llama", 1), kdloss.VanillaKD(causal=True)
    distill = kdloss.Distiller(teacher, criterion)
    student.scale.requires_grad_(False)
    for trained, scale in (False, 0.5), (False, 1.0), (False, 0.7), (True, 0.7), (True, 1.0):
        student.scale.requires_grad_(trained).data.fill_(scale)
        with torch.no_grad():
            distill(student, **batch("llama"))
        expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
        for _ in range(2):
            out = distill(student, **batch("llama"))
            assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
            assert_close(gradients(out.loss, student), grads, 1e-10)
            assert is_lazy(out) == ("scale" not in grads) == (not trained)


REFUSALS = {
    "masks a class": (lambda: like(MasksForCausalLM), "it does more to its head's output"),
    "cuts the classes": (lambda: like(CutsForCausalLM), r"it makes (1, 1, 59) of its head's (1, 1, 61)"),
    "trained scale": (lambda: like(TrainedScaleForCausalLM), "a parameter of its own is trained between"),
    "trained scale in place": (lambda: like(InPlaceForCausalLM), "a parameter of its own is trained between"),
    "head twice": (lambda: like(TwiceForCausalLM), "its head ran 2 times"),
    "other head": (lambda: with_head(model("llama"), scaled), "its head is a Scaled, no plain nn.Linear"),
    "hooks": (lambda: with_head(model("llama"), hooked), "its head has hooks of somebody else's"),
    "forward replaced": (
        lambda: with_head(model("llama"), patched),
        "its head has hooks of somebody else's",
    ),
    "DeepSpeed": (lambda: with_head(model("llama"), partitioned), "sharded, quantised or elsewhere"),
    "compiled": (lambda: torch.compile(model("llama"), backend="eager"), "it was compiled as a whole"),
    "compiled in place": (lambda: compiled_in_place(model("llama")), "it was compiled as a whole"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo warns
@pytest.mark.parametrize("case", REFUSALS)
def test_where_lazy_logits_are_impossible_full_ones_are_computed_and_the_reason_is_logged_once(case, caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    make, reason = REFUSALS[case]
    student = make()
    teacher = like(CutsForCausalLM) if case == "cuts the classes" else model("llama", seed=1)
    criterion = kdloss.VanillaKD(causal=True)
    expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    distill = kdloss.Distiller(teacher, criterion)
    for _ in range(2):
        out = distill(student, **batch("llama"))
        assert out.logits is out.output.logits
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert_close(gradients(out.loss, student), grads, 1e-10)
    ours = [r for r in caplog.records if r.name == "kdloss"]  # torch 2.4 logs messages about its graphs
    messages = [r.getMessage() for r in ours if r.args[0] != "CutsForCausalLM" or "cuts" in case]
    assert reason in messages[0]
    assert len(messages) == (2 if case == "cuts the classes" else 1), messages  # one for each model


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns
def test_full_logits_are_computed_for_a_head_with_lora(caplog):
    from peft import LoraConfig, get_peft_model

    caplog.set_level(logging.INFO, logger="kdloss")
    student = get_peft_model(model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"])).double()
    teacher, criterion = model("llama", seed=1), kdloss.VanillaKD(causal=True)
    expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    out = kdloss.Distiller(teacher, criterion)(student, **batch("llama"))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_close(gradients(out.loss, student), grads, 1e-10)
    assert "its head is a Linear, no plain nn.Linear" in caplog.text


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo warns
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_a_compiled_step_computes_full_logits(caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    student, teacher = model("llama"), model("llama", seed=1)
    criterion = kdloss.VanillaKD(causal=True)
    expected, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    distill = kdloss.Distiller(teacher, criterion)
    step = torch.compile(lambda **inputs: distill(student, **inputs), backend="eager")
    loss = step(**batch("llama")).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_close(gradients(loss, student), grads, 1e-10)
    assert "the step is being compiled" in caplog.text


def test_models_on_meta_give_a_loss_on_meta():
    net, tokens = Net().to("meta"), batch("llama")["input_ids"].to("meta")
    net.get_output_embeddings = lambda: net.head
    criterion = kdloss.VanillaKD(causal=True)
    out = kdloss.Distiller(copy.deepcopy(net), criterion)(net, input_ids=tokens, labels=tokens)
    assert out.loss.is_meta
    assert out.loss.shape == ()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_do_not_shift_their_labels_have_lazy_logits(family):
    student, teacher, inputs = build(family).eval().double(), build(family, seed=1).eval().double(), batch(family)
    logits, target, labels = student(**inputs).logits, teacher(**inputs).logits.detach(), inputs["labels"]
    keep = labels != -100
    ce = nn.functional.cross_entropy(logits[keep], labels[keep])
    kl = nn.functional.kl_div((logits / 2)[keep].log_softmax(-1), (target / 2)[keep].softmax(-1), reduction="batchmean")
    grads = gradients(0.5 * ce + 0.5 * 4 * kl, student)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    for _ in range(2):
        out = distill(student, **inputs)
        assert is_lazy(out)
        assert out.loss.item() == pytest.approx((0.5 * ce + 2 * kl).item(), rel=1e-10)
        assert_close(gradients(out.loss, student), grads, 1e-9)


def mean_over_positions_subtracted(student, teacher, *, temperature=1.0, mask=None):
    values = (student - teacher).square().mean(-1)
    return values - values.masked_fill(~mask, 0).mean()


class ReadsLogits(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.inner = kdloss.VanillaKD(causal=causal)

    def forward(self, student, teacher, *args, **settings):
        assert student.output.logits.argmax(-1).shape == (2, 8)
        return self.inner(student, teacher, *args, **settings)


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (
            partial(kdloss.VanillaKD, divergence=mean_over_positions_subtracted),
            "its divergence needs all of them",
        ),
        (partial(kdloss.VanillaKD, divergence=kdloss.divergences.uld), "its divergence needs all of them"),
        (ReadsLogits, "its criterion may want them"),
    ],
)
def test_criteria_that_may_read_all_logits_get_full_ones(criterion, reason, caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    student, teacher, criterion = model("llama"), model("llama", seed=1), criterion(causal=True)
    out = kdloss.Distiller(teacher, criterion)(student, **batch("llama"))
    assert out.logits is out.output.logits
    assert caplog.text.count(reason) == 2  # student and teacher
    assert out.loss.isfinite()


def test_a_student_and_teachers_may_mix_full_and_lazy_logits():
    student, criterion = like(MasksForCausalLM), kdloss.MultiTeacherKD([0.3, 0.5, 0.2], causal=True)
    teachers = [model("llama", seed=1), like(MasksForCausalLM), model("gemma2", seed=2)]
    with torch.no_grad():
        targets = [teacher(**without_labels("llama")).logits for teacher in teachers]
    inputs = batch("llama")
    mask = inputs["attention_mask"].bool()
    for learner in (student, model("llama")):
        expected = criterion(learner(**without_labels("llama")).logits, targets, inputs["labels"], mask=mask)
        grads = gradients(expected, learner)
        loss = kdloss.Distiller(teachers, criterion)(learner, **inputs).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert_close(gradients(loss, learner), grads, 1e-10)


def test_a_student_equal_to_its_teacher_has_a_zero_loss_and_zero_gradients():
    student = model("gemma2")
    out = kdloss.Distiller(copy.deepcopy(student), kdloss.VanillaKD(alpha=0.0))(student, **batch("gemma2"))
    out.loss.backward()
    assert is_lazy(out)
    assert abs(out.loss.item()) <= 1e-12
    assert all(p.grad.abs().max() <= 1e-12 for p in student.parameters())


def test_a_frozen_head_stays_frozen_and_lets_gradients_through():
    student, teacher = model("llama"), model("llama", seed=1)
    student.lm_head.requires_grad_(False)
    criterion = kdloss.VanillaKD(causal=True)
    _, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    out = kdloss.Distiller(teacher, criterion)(student, **batch("llama"))
    assert is_lazy(out)
    found = gradients(out.loss, student)
    assert_close(found, grads, 1e-10)
    assert "lm_head.weight" not in found


def test_gradient_checkpointing_does_not_change_the_gradients():
    student, teacher = model("llama"), model("llama", seed=1)
    criterion = kdloss.VanillaKD(causal=True)
    _, grads = loss_and_gradients_of_full_logits(criterion, student, teacher)
    checkpointing(student, {"use_reentrant": False})
    student.train()
    out = kdloss.Distiller(teacher, criterion)(student, **batch("llama"))
    assert is_lazy(out)
    assert_close(gradients(out.loss, student), grads, 1e-10)


@pytest.mark.parametrize("around", ["the step", "only the student"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_under_autocast_gradients_are_as_accurate_as_those_of_full_logits(family, around):
    student, teacher = (model(family, seed=s, dtype=torch.float32) for s in (0, 1))
    criterion = kdloss.VanillaKD(causal=True)
    _, exact = loss_and_gradients_of_full_logits(
        criterion, copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), family
    )
    inputs, forward, distill = batch(family), student.forward, kdloss.Distiller(teacher, criterion)
    cast = torch.autocast("cpu", torch.bfloat16)
    if around == "only the student":  # as Accelerate does
        student.forward = cast(student.forward)
    with cast if around == "the step" else nullcontext():
        out = distill(student, **inputs)
        logits = student(**without_labels(family)).logits
        with torch.no_grad():
            target = teacher(**without_labels(family)).logits
        loss = criterion(logits, target, inputs["labels"], mask=inputs["attention_mask"].bool())
    grads = gradients(loss, student)
    student.forward = forward
    found = gradients(out.loss, student)
    assert out.output.logits.hidden.dtype == torch.bfloat16
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(loss.item(), rel=2e-2)

    def error(approximate):
        return torch.stack([(approximate[name] - g).norm() / g.norm() for name, g in exact.items()]).mean()

    assert error(found) <= 1.1 * error(grads)


def number_of_hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_model_is_unchanged_after_a_step_and_after_an_exception():
    student, teacher = model("gemma2"), model("gemma2", seed=1)
    inputs = without_labels("gemma2")
    logits, before = student(**inputs).logits, number_of_hooks(student)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    distill(student, **batch("gemma2")).loss.backward()
    with pytest.raises(IndexError):
        distill(student, input_ids=torch.full((1, 4), 999))
    assert number_of_hooks(student) == before
    assert "forward" not in vars(student.lm_head)
    for other in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(other(**inputs).logits, logits)


def test_another_thread_gets_full_logits_during_a_step():
    student, teacher = model("llama"), model("llama", seed=1)
    given, found = without_labels("llama"), []
    expected = student(**given).logits

    def call_in_another_thread(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(student(**given).logits))
        thread.start()
        thread.join()

    handle = student.model.norm.register_forward_hook(call_in_another_thread)
    out = kdloss.Distiller(teacher, kdloss.VanillaKD())(student, **batch("llama"))
    assert is_lazy(out)
    assert out.output.logits.shape == expected.shape
    assert torch.equal(found[0], expected)


class Net(nn.Module):
    """A user's causal model, which computes no loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)) / 6)


def test_an_empty_batch_does_not_count_as_the_measuring_pass():
    net, tokens = Net(), batch("llama")["input_ids"]
    net.get_output_embeddings = lambda: net.head
    distill = kdloss.Distiller(net, kdloss.VanillaKD(alpha=1.0, causal=True))
    assert distill(net, input_ids=tokens[:0], labels=tokens[:0]).loss.item() == 0
    out = distill(net, input_ids=tokens, labels=tokens)
    assert out.output.logits.scale == pytest.approx(1 / 6)


def test_a_teacher_that_stops_early_runs_no_head(caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    student, teacher, ran = model("llama"), model("llama", seed=1), []
    teacher.lm_head.register_forward_hook(lambda *_: ran.append(1))
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD("last"))
    assert is_lazy(distill(student, **batch("llama")))
    assert not ran
    assert "full logits" not in caplog.text


def test_a_model_without_output_embeddings_computes_full_logits(caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    net, tokens = Net(), batch("llama")["input_ids"]
    criterion = kdloss.VanillaKD(causal=True)
    out = kdloss.Distiller(copy.deepcopy(net), criterion)(net, input_ids=tokens, labels=tokens)
    assert torch.equal(out.output.logits, net(tokens).logits)
    assert "Net makes full logits: it has no output embeddings" in caplog.text


@since_torch(2, 6)
def test_two_processes_give_the_gradients_of_one(tmp_path):
    script = Path(processes.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (family, settings) in processes.CASES.items():
            full = settings is None or "static_graph" in settings
            assert found[name]["kinds"] == {"Tensor" if full else "LazyLogits"}, name
            one = processes.train(family, settings, wrap=False)
            for ours, theirs in zip(found[name]["gradients"], one["gradients"], strict=True):
                for parameter, gradient in theirs.items():
                    torch.testing.assert_close(
                        ours[parameter], gradient, rtol=1e-5, atol=1e-6, msg=f"{name}: {parameter}"
                    )
