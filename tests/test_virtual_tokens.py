"""Prompt tuning adds positions to a model's outputs; only those of the text are compared with labels and teacher."""

import pytest
import torch
import transformers as hf
from families import batch as texts_of
from families import build
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from stepping import kl
from torch.nn import functional as F

import kdloss
from kdloss import CrossEntropy, Distiller, Features, Logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*loss_type=None.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft warns
]
KINDS = {"prompt": {}, "p-tuning": {"encoder_hidden_size": 8}}


def tuned(model, kind="prompt", task="CAUSAL_LM", tokens=4):
    config = PromptTuningConfig if kind == "prompt" else PromptEncoderConfig
    torch.manual_seed(5)
    wrapped = get_peft_model(model, config(task_type=task, num_virtual_tokens=tokens, **KINDS[kind]))
    return wrapped.double().eval()


def first_block(model, batch, where, i=0):
    outputs = []
    base = kdloss.layers.names.unwrap(model)
    handle = base.get_submodule(f"{where}.{i}").register_forward_hook(lambda m, a, out: outputs.append(out))
    model(**batch)
    handle.remove()
    return outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]


def prompts(model):
    return next(p for name, p in model.named_parameters() if "prompt_encoder" in name and p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuned_teacher", [False, True])
@pytest.mark.parametrize("full_logits", [False, True])
def test_a_causal_models_virtual_tokens_are_cut_off_logits_and_features(kind, tuned_teacher, full_logits):
    student, teacher = tuned(build("llama", depth=2), kind), build("llama", depth=3, seed=1).double().eval()
    if tuned_teacher:
        teacher = tuned(teacher, tokens=2)
    batch = texts_of("llama")
    batch["labels"][:, 0] = -100  # peft predicts it at the last virtual token, where a teacher may have no position
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    divergence = kdloss.divergences.dist if full_logits else kdloss.divergences.forward_kl
    criterion = 0.5 * CrossEntropy() + 0.3 * Logits(divergence, temperature=1.0) + 0.2 * Features(pairing=[(0, 1)])
    out = Distiller(teacher, criterion)(student, **batch)
    assert out.logits.shape[:2] == batch["labels"].shape
    keep = batch["labels"][:, 1:] != -100
    s, t = student(**inputs).logits[:, 4:-1], teacher(**inputs).logits[:, 2 if tuned_teacher else 0 : -1].detach()
    h, g = first_block(student, inputs, "model.layers"), first_block(teacher, inputs, "model.layers", 1).detach()
    gaps = (h[:, 4:-1] - g[:, 2 if tuned_teacher else 0 : -1]).square().mean(-1)
    ce, peft_loss = F.cross_entropy(s[keep], batch["labels"][:, 1:][keep]), student(**batch).loss
    torch.testing.assert_close(ce, peft_loss, rtol=1e-6, atol=0.0, check_dtype=False)
    torch.testing.assert_close(out.components["ce"], ce.detach())
    torch.testing.assert_close(out.components["feature"], gaps[keep].mean().detach())
    if not full_logits:
        expected = 0.5 * ce + 0.3 * kl(s, t, 1.0)[keep].mean() + 0.2 * gaps[keep].mean()
        torch.testing.assert_close(out.loss, expected)
        gradients = (torch.autograd.grad(x, prompts(student))[0] for x in (out.loss, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("length", [0, 2, 6])
def test_virtual_tokens_of_an_encoder_are_cut_off_and_the_decoder_keeps_all_positions(length):
    student = tuned(build("t5", depth=2), task="SEQ_2_SEQ_LM")
    teacher, batch = build("t5", depth=3, seed=1).double().eval(), texts_of("t5")
    batch["labels"] = torch.cat([batch["labels"], batch["labels"][:, :length]], 1)
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    inputs["decoder_input_ids"] = student.base_model.prepare_decoder_input_ids_from_labels(batch["labels"])
    terms = Features(pairing=[(0, 1)], blocks="encoder.block", name="encoder")
    terms = terms + Features(pairing=[(0, 1)], blocks="decoder.block", name="decoder")
    out = Distiller(teacher, CrossEntropy() + Logits(temperature=1.0) + terms)(
        student, **inputs, labels=batch["labels"]
    )
    keep, real = batch["labels"] != -100, batch["attention_mask"].bool()
    s, t = student(**inputs).logits, teacher(**inputs).logits.detach()
    torch.testing.assert_close(out.components["ce"], F.cross_entropy(s[keep], batch["labels"][keep]).detach())
    torch.testing.assert_close(out.components["kd"], kl(s, t, 1.0)[keep].mean().detach())
    gaps = {}
    for side in ("encoder", "decoder"):
        h, g = first_block(student, inputs, f"{side}.block"), first_block(teacher, inputs, f"{side}.block", 1)
        gaps[side] = ((h[:, 4:] if side == "encoder" else h) - g).square().mean(-1).detach()
    torch.testing.assert_close(out.components["decoder"], gaps["decoder"][keep].mean())
    examples = torch.stack([gaps["encoder"][i][real[i]].mean() for i in range(2)])
    count = keep.sum(1)
    torch.testing.assert_close(out.components["encoder"], (examples * count).sum() / count.sum())


def test_a_token_classifiers_virtual_tokens_have_no_labels():
    config = build("bert", depth=2).config
    student = tuned(hf.AutoModelForTokenClassification.from_config(config), task="TOKEN_CLS")
    teacher = hf.AutoModelForTokenClassification.from_config(config).double().eval()
    batch = texts_of("bert")
    batch["labels"] = (batch["labels"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    out = Distiller(teacher, kdloss.VanillaKD(1.0, 0.5, causal=False))(student, **batch)  # peft computes no such loss
    keep = batch["labels"] != -100
    s, t = student(**inputs).logits[:, 4:], teacher(**inputs).logits.detach()
    expected = 0.5 * F.cross_entropy(s[keep], batch["labels"][keep]) + 0.5 * kl(s, t, 1.0)[keep].mean()
    torch.testing.assert_close(out.loss, expected)


def test_prefix_tuning_adds_no_positions_and_none_are_cut_off():
    student = get_peft_model(build("gpt2", depth=2), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    student, teacher = student.double().eval(), build("gpt2", depth=3, seed=1).double().eval()
    batch = texts_of("gpt2")
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    out = Distiller(teacher, kdloss.VanillaKD(temperature=1.0, alpha=0.0))(student, **batch)
    keep = batch["labels"][:, 1:] != -100
    s, t = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1].detach()
    torch.testing.assert_close(out.loss, kl(s, t, 1.0)[keep].mean())
