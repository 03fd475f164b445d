"""A student's own loss shows whether its labels are shifted and which losses it adds to cross-entropy."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from families import VOCAB
from torch import nn
from torch.nn.functional import cross_entropy, pad
from versions import since_torch, since_transformers_5

import kdloss
from kdloss import CrossEntropy, Logits, Task

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LARGE_WEIGHTS = {"initializer_range": 0.3}


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LARGE_WEIGHTS, **changes))


def bart():
    config = hf.BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16,
        encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    return hf.BartForCausalLM(config)


def trocr():
    config = hf.TrOCRConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    return hf.TrOCRForCausalLM(config)


def xlnet():
    config = hf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=16, **LARGE_WEIGHTS)
    return hf.XLNetLMHeadModel(config)


def xlm():
    return hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=2, n_heads=2, embed_init_std=0.3))


def gemma3():
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = hf.Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8)
    tokens = {"image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58, "mm_tokens_per_image": 4}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=vision, **tokens))


def mixtral():
    moe = {"num_key_value_heads": 1, "num_local_experts": 4, "router_aux_loss_coef": 0.1}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **LARGE_WEIGHTS, **moe, output_router_logits=True))


def bert(head=hf.BertForMaskedLM, **changes):
    return head(hf.BertConfig(**SMALL, **LARGE_WEIGHTS, **changes))


SHIFTED, UNSHIFTED = [llama, gemma3, mixtral], [bart, trocr, xlnet, xlm, bert]


def made(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def tokens(rows=2, length=9):
    return torch.randint(3, 57, (rows, length), generator=torch.Generator().manual_seed(5))


def divergence(student, teacher, keep):
    """KL(teacher || student), the mean over the kept positions, in float64."""
    s, t = student[keep].double().log_softmax(-1), teacher[keep].detach().double().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def output_of(model, **inputs):
    """The model's output; BART's decoder without an encoder can't store keys."""
    return model(**inputs, **({"use_cache": False} if isinstance(model, hf.BartForCausalLM) else {}))


@pytest.mark.parametrize("build", SHIFTED + UNSHIFTED, ids=lambda build: build.__name__)
def test_alpha_one_is_the_models_own_loss_in_value_and_gradient(build):
    student, teacher, ids = made(build), made(build, 1), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    own = output_of(student, input_ids=ids, labels=labels).loss
    expected = gradients(own, student)
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=1.0))(student, input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, own.detach(), rtol=1e-5, atol=0, check_dtype=False)
    found = gradients(out.loss, student)
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", SHIFTED + UNSHIFTED, ids=lambda build: build.__name__)
def test_the_teacher_is_compared_where_the_model_predicts_a_label(build):
    student, teacher, ids = made(build), made(build, 1), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    s, t = (output_of(m, input_ids=ids).logits for m in (student, teacher))
    keep = labels != -100
    if build in SHIFTED:
        s, t, keep = s[:, :-1], t[:, :-1], keep[:, 1:]
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(temperature=1.0, alpha=0.0))
    found = distill(student, input_ids=ids, labels=labels).loss.item()
    assert found == pytest.approx(divergence(s, t, keep).item(), rel=1e-4)


@pytest.mark.parametrize("build", [llama, bart], ids=lambda build: build.__name__)
def test_without_labels_the_shift_is_measured_with_the_input_ids(build):
    student, teacher, ids = made(build), made(build, 1), tokens()
    s, t = (output_of(m, input_ids=ids).logits for m in (student, teacher))
    upto = -1 if build is llama else None
    expected = divergence(s[:, :upto], t[:, :upto], slice(None)).item()
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(temperature=1.0, alpha=0.0))
    assert distill(student, input_ids=ids).loss.item() == pytest.approx(expected, rel=1e-4)
    assert distill(student, ids).loss.item() == pytest.approx(expected, rel=1e-4)


def test_input_ids_beyond_the_number_of_classes_are_not_used_as_labels():
    student, ids = made(lambda: bert(hf.BertForTokenClassification, num_labels=3)), tokens()
    found = kdloss.Distiller(copy.deepcopy(student), kdloss.VanillaKD(alpha=0.0))(student, input_ids=ids).loss
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_the_shift_is_measured_once_in_eval_mode_and_the_measurement_changes_nothing():
    student, ids, ran = llama(attention_dropout=0.5), tokens(), []
    student.model.layers[0].eval()
    modes = [module.training for module in student.modules()]

    def note(module, args, inputs):
        ran.append((module.training, torch.is_grad_enabled(), "labels" in inputs))

    student.register_forward_pre_hook(note, with_kwargs=True)
    distill = kdloss.Distiller(made(llama, 1), kdloss.VanillaKD())
    noise = torch.get_rng_state()
    for _ in range(2):
        distill(student, input_ids=ids, labels=ids)
    assert ran == [(False, False, True), (True, True, False), (True, True, False)]
    assert [module.training for module in student.modules()] == modes
    torch.set_rng_state(noise)
    first = distill(student, input_ids=ids, labels=ids).loss
    torch.set_rng_state(noise)
    fresh = kdloss.Distiller(made(llama, 1), kdloss.VanillaKD())(student, input_ids=ids, labels=ids).loss
    assert torch.equal(first, fresh)


@pytest.mark.parametrize("build", [llama, bert, gemma3, xlnet], ids=lambda build: build.__name__)
@pytest.mark.parametrize("labels", ["all", "all ignored", "no labels"])
def test_every_rank_makes_the_same_forward_pass_with_any_labels(build, labels):
    student, ids, ran = made(build), tokens(), []
    more = {"all": {"labels": ids}, "all ignored": {"labels": torch.full_like(ids, -100)}, "no labels": {}}[labels]
    student.register_forward_hook(lambda module, args, output: ran.append(output.loss))
    distill = kdloss.Distiller(None, kdloss.VanillaKD())
    assert distill.shifts(student, input_ids=ids, **more) is (build in SHIFTED)
    assert len(ran) == 1
    assert ran[0].isfinite()


def test_the_shift_is_measured_on_few_positions_of_a_long_text():
    student, teacher, ids, widths = made(llama), made(llama, 1), tokens(2, 90), []
    labels = ids.clone()
    labels[:, :50] = -100
    labels[0] = -100
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=1.0))
    handle = student.register_forward_hook(lambda m, a, out: widths.append(out.logits.shape[1]))
    found = distill(student, input_ids=ids, labels=labels).loss.item()
    handle.remove()
    assert widths[0] <= 32
    assert found == pytest.approx(student(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_each_student_is_measured_separately():
    distill, ids = kdloss.Distiller(made(llama, 1), kdloss.VanillaKD(alpha=1.0)), tokens()
    for build in (llama, bart, llama):
        student = made(build)
        own = output_of(student, input_ids=ids, labels=ids).loss.item()
        assert distill(student, input_ids=ids, labels=ids).loss.item() == pytest.approx(own, rel=1e-5)


def test_shift_labels_are_not_shifted_again():
    student, teacher, ids = made(llama), made(llama, 1), tokens()
    shifted = pad(ids[:, 1:], (0, 1), value=7)  # where ranks share a text, the last label is the next rank's
    shifted[0, :3] = -100
    s, t, keep = student(ids).logits, teacher(ids).logits, shifted != -100
    ce = cross_entropy(s[keep].double(), shifted[keep])
    expected = (0.5 * ce + 0.5 * divergence(s, t, keep)).item()
    for causal in (None, True, False):
        distill = kdloss.Distiller(teacher, kdloss.VanillaKD(temperature=1.0, causal=causal))
        for more in ({}, {"labels": ids}):
            found = distill(student, input_ids=ids, shift_labels=shifted, **more)
            assert found.loss.item() == pytest.approx(expected, rel=1e-5)


def test_task_is_the_students_own_loss_of_shift_labels():
    student, teacher, ids = made(llama), made(llama, 1), tokens()
    shifted = pad(ids[:, 1:], (0, 1), value=7)
    own = student(ids, labels=ids, shift_labels=shifted).loss.item()
    distill = kdloss.Distiller(teacher, kdloss.Sum(Task(), 0.0 * Logits()))
    found = distill(student, input_ids=ids, labels=ids, shift_labels=shifted)
    assert found.loss.item() == pytest.approx(own, rel=1e-6)


class Balanced(hf.LlamaForCausalLM):
    """Adds a z-loss to its loss, but computes it only if it gets labels."""

    def forward(self, *args, labels=None, **inputs):
        out = super().forward(*args, labels=labels, **inputs)
        if labels is not None:
            out["z_loss"] = out.logits.logsumexp(-1).square().mean()
            out["loss"] = out.loss + self.config.z_loss_coefficient * out.z_loss
        return out


def balanced():
    return Balanced(hf.LlamaConfig(**SMALL, **LARGE_WEIGHTS, z_loss_coefficient=0.05))


def switch():
    config = hf.SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=2, expert_capacity=32, output_router_logits=True,
        router_z_loss_coef=0.2, router_aux_loss_coef=0.3, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_aux_loss_of_a_mixture_of_experts_is_added_with_the_models_coefficient(alpha):
    student, teacher, ids = made(mixtral), made(llama, 1), tokens()
    own = student(input_ids=ids, labels=ids)
    kd = divergence(own.logits[:, :-1], teacher(ids).logits[:, :-1], slice(None))
    expected = gradients(alpha * own.loss + (1 - alpha) * kd, student)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(temperature=1.0, alpha=alpha))
    out = distill(student, input_ids=ids, labels=ids)
    assert out.loss.item() == pytest.approx((alpha * own.loss + (1 - alpha) * kd).item(), rel=1e-5)
    assert out.components["aux_loss"].item() == pytest.approx(0.1 * own.aux_loss.item(), rel=1e-5)
    ce = own.loss.item() - 0.1 * own.aux_loss.item()
    assert out.components["ce"].item() == pytest.approx(ce, rel=1e-5)
    found = gradients(out.loss, student)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5)


def nllb():
    config = hf.NllbMoeConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, expert_capacity=16, encoder_sparse_step=1,
        decoder_sparse_step=1, output_router_logits=True, max_position_embeddings=64, router_aux_loss_coef=0.3,
        init_std=0.3, decoder_start_token_id=2, pad_token_id=1, moe_eval_capacity_token_fraction=-1.0,
    )  # fmt: skip
    return hf.NllbMoeForConditionalGeneration(config)


AUX, Z = {"encoder_aux_loss", "decoder_aux_loss"}, {"encoder_z_loss", "decoder_z_loss"}
MODELS_WITH_NAMED_LOSSES = [
    (switch, {"output_router_logits": True}, AUX | Z),
    pytest.param(nllb, {}, AUX, marks=since_transformers_5),
    (balanced, {}, {"z_loss"}),
]


@pytest.mark.parametrize(("build", "more", "names"), MODELS_WITH_NAMED_LOSSES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_named_loss_of_a_model_is_added(build, more, names):
    student, ids = made(build), tokens()
    own = student(input_ids=ids, labels=ids, **more).loss
    expected = gradients(own, student)
    out = kdloss.Distiller(None, kdloss.VanillaKD(alpha=1.0))(student, input_ids=ids, labels=ids, **more)
    assert out.loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert out.components.keys() == {"ce"} | names
    found = gradients(out.loss, student)
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-4)


def test_without_cross_entropy_no_named_loss_is_added():
    student, teacher, ids = made(mixtral), made(llama, 1), tokens()
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=0.0))(student, input_ids=ids, labels=ids)
    assert sorted(out.components) == ["kd"]


def smoothed():
    student = llama()
    student.loss_function = lambda logits, labels, **_: cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3
    )
    return student


def zero_head():
    student = llama()
    nn.init.zeros_(student.lm_head.weight)
    return student


class WithoutLoss(nn.Module):
    """A language model that computes no loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids, **more):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)), **more)


def test_causal_is_required_for_logits_selected_by_take():
    """nanoGPT's models return (logits, loss), and its data loader shifts the labels."""

    class Pair(WithoutLoss):
        def forward(self, input_ids):
            return self.head(self.embed(input_ids)), None

    student, ids = made(Pair), tokens()
    distill = kdloss.Distiller(None, kdloss.Sum(CrossEntropy(take=0)))
    with pytest.raises(ValueError, match="causal=True where labels are the input's own ids"):
        distill(student, ids, labels=ids)
    explicit = kdloss.Distiller(None, kdloss.Sum(CrossEntropy(take=0), causal=False))
    expected = cross_entropy(student(ids)[0].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(explicit(student, ids, labels=ids).loss, expected)


@pytest.mark.parametrize("build", [smoothed, zero_head, WithoutLoss], ids=lambda build: build.__name__)
def test_causal_is_required_where_the_own_loss_does_not_show_the_shift(build):
    student, teacher, ids = made(build), made(llama, 1), tokens()
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    with pytest.raises(ValueError, match=r"causal=True where labels are the input's own ids.*kdloss\.Task\(\)"):
        distill(student, input_ids=ids, labels=ids)
    logits = student(input_ids=ids).logits
    for causal, x, y in ((True, logits[:, :-1], ids[:, 1:]), (False, logits, ids)):
        explicit = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=1.0, causal=causal))
        found = explicit(student, input_ids=ids, labels=ids).loss.item()
        assert found == pytest.approx(cross_entropy(x.flatten(0, 1), y.flatten()).item(), rel=1e-5)


WRONG = {
    "beyond the classes": (
        lambda y: y.index_fill(1, torch.tensor([3]), VOCAB),
        ValueError,
        r"labels\[0, 3\] is 61, out",
    ),
    "negative": (lambda y: y.index_fill(1, torch.tensor([3]), -1), ValueError, r"labels\[0, 3\] is -1, outside the 61"),
    "of 32 bits": (lambda y: y.int(), TypeError, r"labels must be int64 class indices.*labels\.long\(\)"),
}


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_labels_of_the_first_batch_are_named_and_the_corrected_ones_are_measured(wrong, error, match):
    model, x = made(llama), tokens()
    distill = kdloss.Distiller(made(llama, seed=1), kdloss.VanillaKD(alpha=1.0))
    for _ in range(2):
        with pytest.raises(error, match=match):
            distill(model, input_ids=x, labels=wrong(x))
    y = x.masked_fill(x == x[0, 1], -100)
    exact = cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    torch.testing.assert_close(distill(model, input_ids=x, labels=y).loss, exact)


def test_task_is_the_loss_function_that_a_user_gave_the_model():
    student, teacher, ids = made(smoothed), made(llama, 1), tokens()
    own = student(input_ids=ids, labels=ids)
    kd = divergence(own.logits[:, :-1], teacher(ids).logits[:, :-1], slice(None))
    criterion = kdloss.Sum(0.5 * Task(), 0.5 * Logits(), causal=True)
    out = kdloss.Distiller(teacher, criterion)(student, input_ids=ids, labels=ids)
    assert out.loss.item() == pytest.approx((0.5 * own.loss + 0.5 * kd).item(), rel=1e-5)


@pytest.mark.parametrize("build", [llama, bert], ids=lambda build: build.__name__)
def test_a_criterion_without_a_distiller_requires_causal_for_outputs_of_models(build):
    student, ids = made(build), tokens()
    output = student(input_ids=ids)
    with pytest.raises(ValueError, match="nothing says whether those at t learn label t"):
        kdloss.VanillaKD()(output, output, ids)
    assert kdloss.VanillaKD(alpha=0.0)(output, output).item() == pytest.approx(0.0, abs=1e-6)
    for causal, x, y in ((True, output.logits[:, :-1], ids[:, 1:]), (False, output.logits, ids)):
        found = kdloss.Sum(CrossEntropy(), causal=causal)(output, labels=ids)
        torch.testing.assert_close(found, cross_entropy(x.flatten(0, 1), y.flatten()))


def test_a_module_that_wraps_a_model_shows_the_same_shift():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    student, teacher, ids = made(llama), made(llama, 1), tokens()
    own = student(input_ids=ids, labels=ids).loss.item()
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=1.0))
    assert distill(Wrapper(copy.deepcopy(student)), input_ids=ids, labels=ids).loss.item() == pytest.approx(own)


def fsmt():
    config = hf.FSMTConfig(
        src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.3,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return hf.FSMTForConditionalGeneration(config)


def m2m():
    config = hf.M2M100Config(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.3, max_position_embeddings=64,
    )  # fmt: skip
    return hf.M2M100ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [fsmt, m2m], ids=lambda build: build.__name__)
def test_a_decoder_gets_the_inputs_that_the_models_forward_makes_from_labels(build):
    """FSMT's method for collators returns other inputs than its forward uses, and overwrites the labels."""
    student, teacher, ids = made(build), made(build, 1), tokens()
    labels = tokens(length=7)
    labels[0, 4:] = -100
    if build is fsmt:
        labels = labels.new_full((2, 9), -100)
        labels[:, :6] = ids[:, 3:]
    before = labels.clone()
    own, theirs = (m(input_ids=ids.clone(), labels=labels) for m in (student, teacher))
    expected = 0.5 * own.loss + 0.5 * divergence(own.logits, theirs.logits, labels != -100)
    slopes = gradients(expected, student)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(temperature=1.0))
    out = distill(student, input_ids=ids, labels=labels)
    assert torch.equal(labels, before)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if build is m2m:  # FSMT's forward also overwrites input_ids, which the student's backward needs unchanged
        found = gradients(out.loss, student)
        for name, slope in slopes.items():
            torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, bert], ids=lambda build: build.__name__)
def test_losses_in_half_precision_show_the_shift(build, dtype):
    student, ids = made(build).to(dtype), tokens(4, 20)
    own = student(input_ids=ids, labels=ids).loss.item()
    out = kdloss.Distiller(None, kdloss.VanillaKD(alpha=1.0))(student, input_ids=ids, labels=ids)
    assert out.loss.item() == pytest.approx(own, rel=1e-2)


@since_torch(2, 6)
def test_the_measurement_compiles_no_graph():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    student, ids = torch.compile(made(llama), backend=counting), tokens()
    distill = kdloss.Distiller(made(llama, 1), kdloss.VanillaKD())
    assert distill.shifts(student, input_ids=ids, labels=ids)
    assert graphs == []
    student(input_ids=ids)
    assert graphs
