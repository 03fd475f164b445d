"""The Distiller: one pass of each model, a teacher left unchanged, and Hugging Face's loss at alpha 1."""

import copy
import gc
import logging
import weakref
from types import SimpleNamespace as Output

import pytest
import torch
from families import CAUSAL, batch, build, checkpointing
from torch import nn
from versions import since_transformers_5

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


class Runs:
    """Count how often a model and each of its blocks run."""

    def __init__(self, model):
        self.model, self.blocks = 0, [0] * len(kdloss.layers.find_blocks(model))
        model.register_forward_hook(self.count_model)
        for i, block in enumerate(kdloss.layers.find_blocks(model)):
            block.register_forward_hook(lambda *_, i=i: self.count(i))

    def count(self, i):
        self.blocks[i] += 1

    def count_model(self, *_):
        self.model += 1


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def pair(width=64, teacher_width=96):
    """A teacher with 8 blocks, 96 wide, and a student with 4 blocks, 64 wide."""
    return build("gpt2", width=teacher_width, depth=8), build("gpt2", width=width, depth=4, seed=1)


def test_a_ten_line_loop_trains_student_and_projections(tmp_path):
    teacher, student = pair()
    before_teacher = {k: v.clone() for k, v in teacher.state_dict().items()}
    criterion = kdloss.FeatureKD(layers="auto")
    distill = kdloss.Distiller(teacher, criterion)
    distill.prepare(student)
    optimizer = torch.optim.AdamW([*student.parameters(), *criterion.parameters()], lr=1e-3)
    start = {k: v.clone() for k, v in criterion.state_dict().items()}
    losses = []
    for _ in range(40):
        out = distill(student, **batch("gpt2"))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.components["feature"].item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(not torch.equal(v, start[k]) for k, v in criterion.state_dict().items())
    assert all(torch.equal(v, before_teacher[k]) for k, v in teacher.state_dict().items())

    torch.save({"student": student.state_dict(), "criterion": criterion.state_dict()}, tmp_path / "step.pt")
    saved = torch.load(tmp_path / "step.pt")
    fresh_student, fresh = pair()[1], kdloss.FeatureKD(layers="auto")
    resumed = kdloss.Distiller(teacher, fresh).prepare(fresh_student)
    fresh_student.load_state_dict(saved["student"])
    fresh.load_state_dict(saved["criterion"])
    resumed.prepare(fresh_student)  # a second call, as in a script that is run again, loses nothing
    continued = resumed(fresh_student, **batch("gpt2"))
    assert torch.equal(continued.loss, distill(student, **batch("gpt2")).loss)


def test_nothing_of_the_teacher_is_in_any_state_dict_or_parameter_list():
    teacher, student = pair()
    criterion = kdloss.FeatureKD(logit_weight=1.0)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    distill(student, **batch("gpt2")).loss.backward()
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert len(student.state_dict()) == len(pair()[1].state_dict())
    assert sorted(criterion.state_dict()) == [
        f"terms.feature.projections.{i}.{part}" for i in range(4) for part in ("bias", "weight")
    ]
    assert not any(p.data_ptr() in theirs for p in [*student.parameters(), *criterion.parameters()])
    assert not isinstance(distill, nn.Module)


@pytest.mark.parametrize(
    ("layers", "pairing", "logit_weight", "deepest"),
    [
        ("auto", "uniform", 0.0, 7),
        ([0, 1], "uniform", 0.0, 2),
        ("auto", "first", 0.0, 3),
        ([0], "same", 1.0, 7),
    ],
)
def test_the_student_runs_once_and_no_teacher_block_runs_after_the_deepest_needed(
    layers, pairing, logit_weight, deepest
):
    teacher, student = pair()
    criterion = kdloss.FeatureKD(layers, pairing=pairing, logit_weight=logit_weight)
    distill = kdloss.Distiller(teacher, criterion).prepare(student, **batch("gpt2"))
    teacher_runs, student_runs = Runs(teacher), Runs(student)
    before = hooks(teacher), hooks(student)
    distill(student, **batch("gpt2")).loss.backward()
    assert (student_runs.model, student_runs.blocks) == (1, [1] * 4)
    assert teacher_runs.blocks == [1] * (deepest + 1) + [0] * (7 - deepest)
    assert (hooks(teacher), hooks(student)) == before


def test_at_alpha_one_the_teacher_does_not_run():
    teacher, student = pair()
    for criterion in (kdloss.VanillaKD(alpha=1.0), kdloss.FeatureKD(alpha=1.0)):
        runs = Runs(teacher)
        kdloss.Distiller(teacher, criterion)(student, **batch("gpt2"))
        assert runs.blocks == [0] * 8


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_alpha_one_equals_hugging_faces_loss_with_padding(family, padding):
    student, inputs = build(family).eval(), batch(family)
    if padding == "left":
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    expected = student(**inputs)
    expected.loss.backward()
    slopes = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    criterion = kdloss.VanillaKD(alpha=1.0)
    out = kdloss.Distiller(student, criterion)(student, **inputs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for p, slope in zip(student.parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad, slope, rtol=1e-5, atol=1e-7)


def test_alpha_one_under_accumulation_equals_hugging_faces_loss_of_the_full_batch():
    student, inputs = build("llama").eval(), batch("llama")
    inputs["labels"][0, 3:] = -100
    full = student(**inputs).loss
    counted = (inputs["labels"][:, 1:] != -100).sum()
    distill = kdloss.Distiller(student, kdloss.VanillaKD(alpha=1.0))
    losses = []
    for i in range(2):
        micro = {name: x[i : i + 1] for name, x in inputs.items()}
        losses.append(distill(student, **micro, num_items_in_batch=counted).loss)
        expected = student(**micro, num_items_in_batch=counted).loss
        assert losses[-1].item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(losses).item() == pytest.approx(full.item(), rel=1e-6)


def test_models_return_no_generation_cache_and_no_loss():
    teacher, student = pair()
    seen = []
    teacher.register_forward_hook(lambda m, a, out: seen.append(out))
    out = kdloss.Distiller(teacher, kdloss.VanillaKD())(student, **batch("gpt2"))
    for output in (out.output, *seen):
        assert output.past_key_values is None
        assert output.loss is None


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_labels_of_models_that_do_not_shift_are_not_shifted(family):
    model, inputs = build(family).eval(), batch(family)
    out = kdloss.Distiller(model, kdloss.VanillaKD(alpha=1.0))(model, **inputs)
    assert out.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)


def test_a_measured_causal_setting_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    teacher, student = pair()
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    for _ in range(2):
        distill(student, **batch("gpt2"))
    loss = student.eval()(**batch("gpt2")).loss.item()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "kdloss"]
    assert message.startswith(
        f"causal=True, measured: GPT2LMHeadModel's own loss is {loss:.6g}, cross-entropy {loss:.6g} "
    )


def test_a_causal_setting_of_the_caller_is_not_changed():
    teacher, student = pair()
    criterion = kdloss.VanillaKD(causal=False)
    inputs = batch("gpt2") | {"labels": torch.zeros(2, 8, dtype=torch.long)}
    loss = kdloss.Distiller(teacher, criterion)(student, **inputs).loss
    assert criterion.causal is False
    assert loss.isfinite()


def test_a_step_does_not_change_the_modes_and_requires_grad_of_the_teacher():
    teacher, student = pair()
    teacher.train()
    teacher.transformer.h[2].eval()
    teacher.transformer.h[3].requires_grad_(False)
    modes = [m.training for m in teacher.modules()]
    requires_grad = [p.requires_grad for p in teacher.parameters()]
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD(logit_weight=1.0)).prepare(student)
    seen = []
    teacher.transformer.h[0].register_forward_hook(lambda m, *_: seen.append((m.training, torch.is_grad_enabled())))
    distill(student, **batch("gpt2")).loss.backward()
    assert seen == [(False, False)]
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == requires_grad
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(IndexError):  # a token outside the vocabulary stops the pass
        distill(student, input_ids=torch.full((1, 4), 999))
    assert [m.training for m in teacher.modules()] == modes


class Counted(nn.Module):
    """Two layers and a head. Each pass records the number of hooks on the model, and on all its modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.seen = []

    def forward(self, x):
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules()]
        self.seen.append((hooks[0], sum(hooks)))
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize("logit_weight", [0.0, 1.0])
def test_only_captured_modules_get_hooks(logit_weight):
    student, teacher = Counted(), Counted()
    criterion = kdloss.FeatureKD(pairing=[("first", "first"), ("second", "second")], logit_weight=logit_weight)
    distill = kdloss.Distiller(teacher, criterion)
    for _ in range(2):
        distill(student, torch.ones(2, 3), labels=torch.tensor([0, 1]))
    assert student.seen == teacher.seen == [(0, 2)] * 2
    assert hooks(student) == hooks(teacher) == 0


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_without_masks_all_features_count(shape):
    torch.manual_seed(0)
    x, labels = torch.randn(2, 3, 3), torch.randint(0, 5, shape)
    student, teacher = Counted(), Counted()
    if len(shape) == 1:
        student.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    criterion = kdloss.FeatureKD(pairing=[("first", "first")], causal=False)
    distill = kdloss.Distiller(teacher, criterion)
    expected = (student.first(x) - teacher.first(x)).square().mean().detach()
    for mask in (None, torch.ones(2, 3, dtype=torch.bool), None):
        out = distill(student, x, labels=labels, feature_mask=mask)
        torch.testing.assert_close(out.components["feature"], expected)


def test_no_feature_is_held_after_the_step():
    teacher, student = pair()
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD(logit_weight=1.0)).prepare(student)
    features = []
    handle = student.transformer.h[3].register_forward_hook(
        lambda m, a, out: features.append(weakref.ref(out[0] if isinstance(out, tuple) else out))  # transformers 4
    )
    out = distill(student, **batch("gpt2"))
    handle.remove()
    out.loss.backward()
    gc.collect()
    before_next_step = [ref() for ref in features]
    del out
    gc.collect()
    assert features
    assert [ref() for ref in features] == [None] * len(features), before_next_step


def test_several_teachers_are_averaged():
    teachers, student = [build("gpt2", seed=s, depth=4).eval() for s in (3, 4)], pair()[1].eval()
    criterion = kdloss.MultiTeacherKD([0.2, 0.8], alpha=0.5, causal=True)
    inputs = batch("gpt2")
    out = kdloss.Distiller(teachers, criterion)(student, **inputs)
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        targets = [teacher(**plain).logits for teacher in teachers]
    expected = criterion(student(**plain), targets, inputs["labels"], mask=inputs["attention_mask"].bool())
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(TypeError, match="MultiTeacherKD"):
        kdloss.Distiller(teachers, kdloss.VanillaKD())


def test_every_criterion_takes_captured_outputs():
    teacher, student = (m.eval() for m in pair())
    inputs = {k: v for k, v in batch("gpt2").items() if k != "labels"}
    labels, mask = batch("gpt2")["labels"], inputs["attention_mask"].bool()
    with kdloss.capture(student, [0, 3]) as s:
        student(**inputs)
    with torch.no_grad(), kdloss.capture(teacher, [0, 7]) as t:
        teacher(**inputs)
    feature = kdloss.FeatureKD([0, 3], logit_weight=1.0, causal=True).prepare(student, teacher)
    expected = kdloss.Distiller(teacher, feature)(student, **batch("gpt2")).loss
    torch.testing.assert_close(feature(s, t, labels, mask=mask), expected)
    vanilla = kdloss.VanillaKD(causal=True)
    torch.testing.assert_close(
        vanilla(s, t, labels, mask=mask), vanilla(s.output.logits, t.output.logits, labels, mask=mask)
    )
    several = kdloss.MultiTeacherKD(causal=True)
    torch.testing.assert_close(several(s, [t, t], labels, mask=mask), vanilla(s, t, labels, mask=mask))


def test_padding_changes_no_term():
    teacher, student = (m.eval() for m in pair())
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD(logit_weight=1.0)).prepare(student)
    clean, dirty = batch("gpt2"), batch("gpt2")
    dirty["input_ids"][1, 5:] = 9  # other tokens in the padding
    dirty["labels"][1, 5:] = 9  # with labels that are not -100
    one, other = distill(student, **clean), distill(student, **dirty)
    torch.testing.assert_close(other.loss, one.loss)
    for name, value in one.components.items():
        torch.testing.assert_close(other.components[name], value)


def test_a_missing_prepare_raises_an_error_with_the_line_to_write():
    teacher, student = pair()
    with pytest.raises(ValueError, match=r"Before building the optimizer write model\.prepare\(\*\*batch\)"):
        kdloss.Distiller(teacher, kdloss.FeatureKD())(student, **batch("gpt2"))


def test_equal_widths_need_no_prepare():
    teacher, student = pair(width=96)
    out = kdloss.Distiller(teacher, kdloss.FeatureKD())(student, **batch("gpt2"))
    assert set(out.components) == {
        "ce",
        "feature",
        "feature/0-0",
        "feature/1-2",
        "feature/2-5",
        "feature/3-7",
    }


def test_random_pairing_captures_the_blocks_that_it_drew():
    teacher, student = pair(width=96)
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD(pairing="random", alpha=0.0))
    drawn = {tuple(sorted(distill(student, **batch("gpt2")).components)) for _ in range(10)}
    assert len(drawn) > 1


def test_prepare_measures_widths_at_the_blocks_that_a_random_pairing_drew():
    teacher, student = pair()
    for seed in range(5):
        torch.manual_seed(seed)
        distill = kdloss.Distiller(teacher, kdloss.FeatureKD(pairing="random")).prepare(student, **batch("gpt2"))
        assert len(distill.criterion.terms["feature"].projections) == 4


def test_vocabularies_that_differ_are_refused():
    teacher, student = build("llama"), build("llama")
    student.resize_token_embeddings(59)
    inputs = batch("llama")
    inputs["input_ids"] = inputs["input_ids"].clamp(max=58)
    with pytest.raises(ValueError, match="student has 59 classes and the teacher 61"):
        kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=0.0))(student, **inputs)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=since_transformers_5)])
def test_activation_checkpointing_gives_the_plain_gradient(reentrant):
    """Transformers checkpoints a block's forward, so that hooks on the block see its real output."""
    teacher, student = pair()
    student.train()
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD()).prepare(student)
    distill(student, **batch("gpt2")).loss.backward()
    plain = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    checkpointing(student, {"use_reentrant": reentrant})
    distill(student, **batch("gpt2")).loss.backward()
    for n, p in student.named_parameters():
        torch.testing.assert_close(p.grad, plain[n])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # raised in peft
def test_a_lora_student_trains_its_adapters_and_the_projections():
    from peft import LoraConfig, get_peft_model

    teacher, student = pair()
    student = get_peft_model(student, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    criterion = kdloss.FeatureKD()
    out = kdloss.Distiller(teacher, criterion).prepare(student)(student, **batch("gpt2"))
    out.loss.backward()
    assert all(p.grad is not None for p in criterion.parameters())
    assert all((p.grad is not None) == ("lora" in n) for n, p in student.named_parameters())


def test_a_compiled_student_is_distilled_by_logits():
    teacher, student = (m.eval() for m in pair())
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    plain = distill(student, **batch("gpt2")).loss
    compiled = torch.compile(student, backend="eager")
    torch.testing.assert_close(distill(compiled, **batch("gpt2")).loss, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised in dynamo
def test_a_student_of_compiled_blocks_is_distilled_by_features():
    teacher, student = (m.eval() for m in pair(width=96))
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD())
    plain = distill(student, **batch("gpt2")).loss
    for block in kdloss.layers.find_blocks(student):
        block.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(distill(student, **batch("gpt2")).loss, plain)


def test_a_custom_criterion_works():
    class LogitMSE(nn.Module):
        def forward(self, student, teacher, labels, *, mask, num_items_in_batch):
            values = kdloss.distances.mse(student.output.logits, teacher.output.logits)
            return kdloss.reduce(values, mask, num_items_in_batch=num_items_in_batch)

    teacher, student = pair()
    out = kdloss.Distiller(teacher, LogitMSE())(student, **batch("gpt2"))
    assert out.loss > 0
    assert out.components == {}


def test_a_loop_without_hugging_face_works_on_tensors():
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, -100, 2, 3])
    criterion = kdloss.VanillaKD()
    out = kdloss.Distiller(teacher, criterion)(student, x, labels=y)
    torch.testing.assert_close(out.loss, criterion(student(x), teacher(x), y))
    assert out.logits is out.output
    masked = kdloss.Distiller(teacher, criterion)(student, x, labels=y, mask=y != 1).loss
    torch.testing.assert_close(masked, criterion(student(x), teacher(x), y.masked_fill(y == 1, -100)))


@pytest.mark.parametrize("wrap", [lambda x: Output(logits=x), lambda x: {"logits": x}], ids=["object", "dict"])
def test_any_output_with_logits_is_accepted(wrap):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return wrap(self.layer(x))

    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 2, 3])
    assert kdloss.Distiller(Net(), kdloss.VanillaKD())(Net(), x, labels=y).logits.shape == (5, 4)


def test_an_output_without_logits_raises_an_error_with_the_term_to_write():
    class Net(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(TypeError, match=r"student's logits are needed.*kdloss\.CrossEntropy\(take=0\)"):
        kdloss.Distiller(Net(6, 4), kdloss.VanillaKD(alpha=0.0))(Net(6, 4), torch.randn(5, 6))


def test_with_a_token_map_a_teacher_with_other_token_ids_gives_the_same_loss():
    """As for gpt2 and opt: a token map translates the inputs and the logits of the teacher."""
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    renamed = copy.deepcopy(teacher)
    ids = torch.randperm(renamed.config.vocab_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        renamed.get_input_embeddings().weight[ids] = teacher.get_input_embeddings().weight.clone()
    shared = kdloss.TokenMap(torch.arange(len(ids)), ids)
    inputs = batch("gpt2")
    plain = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=0.3))(student, **inputs)
    mapped = kdloss.Distiller(renamed, kdloss.VanillaKD(alpha=0.3, vocabulary=shared))(student, **inputs)
    torch.testing.assert_close(mapped.loss, plain.loss)
    slopes = [torch.autograd.grad(out.loss, list(student.parameters())) for out in (mapped, plain)]
    torch.testing.assert_close(*slopes)
    unmapped = kdloss.Distiller(renamed, kdloss.VanillaKD(alpha=0.3))(student, **inputs)
    assert abs(unmapped.loss - plain.loss) > 1e-4


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [2, None, 99], ids=["has a padding token", "has none", "has one without a row"])
def test_padding_that_only_the_student_has_is_the_teachers_own_padding_where_the_mask_is_0(side, padding):
    teacher, student = build("gpt2", width=24, depth=2), build("gpt2", depth=2, seed=1)
    teacher.config.pad_token_id = padding
    ids = torch.arange(60).flip(0)  # token 60 of the student has no counterpart
    shared = kdloss.TokenMap(torch.arange(60), ids)
    x, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 60, 60]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if side == "left":
        x, mask = x.flip(1), mask.flip(1)
    read = []
    teacher.register_forward_pre_hook(lambda _, args, inputs: read.append(inputs["input_ids"]), with_kwargs=True)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0, vocabulary=shared, causal=True))
    loss = distill(student, input_ids=x, attention_mask=mask).loss
    assert torch.equal(read[0][mask == 1], ids[x[mask == 1]])
    assert (read[0][mask == 0] == (2 if padding == 2 else ids[x[mask == 1][0]])).all()
    s = student(input_ids=x, attention_mask=mask).logits[..., :60].double().log_softmax(-1)
    t = teacher(input_ids=ids[x.where(mask == 1, 0)], attention_mask=mask).logits[..., ids].double().log_softmax(-1)
    counted = mask[:, :-1] * mask[:, 1:] == 1
    expected = (t.exp() * (t - s)).sum(-1)[:, :-1][counted].mean()
    torch.testing.assert_close(loss, expected.float())
    slopes = [torch.autograd.grad(value, list(student.parameters())) for value in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_a_token_that_is_read_and_that_the_teacher_lacks_is_refused():
    shared = kdloss.TokenMap(torch.arange(60), torch.arange(60))
    distill = kdloss.Distiller(build("gpt2"), kdloss.VanillaKD(alpha=0.0, vocabulary=shared, causal=True))
    x = torch.tensor([[5, 60, 7]])
    for more in ({}, {"attention_mask": torch.ones_like(x)}):
        with pytest.raises(ValueError, match=r"tokens \[60\] of the student have no counterpart"):
            distill(build("gpt2", seed=1), input_ids=x, **more)


class Linear(nn.Linear):
    """A model with a criterion of its own that is no distillation."""

    criterion = nn.CrossEntropyLoss()


def test_a_distillation_as_the_student_is_refused_when_it_is_given():
    inside = kdloss.Distillation(nn.Linear(4, 3), nn.Linear(4, 3), kdloss.VanillaKD())
    for student in (inside, nn.DataParallel(inside)):
        with pytest.raises(TypeError, match=r"the student is a Distillation.*give the model inside, model\.student"):
            kdloss.Distillation(student, nn.Linear(4, 3), kdloss.VanillaKD())
    x, y = torch.randn(2, 4), torch.tensor([0, 2])
    assert kdloss.Distillation(Linear(4, 3), inside, kdloss.VanillaKD())(x, labels=y).loss.isfinite()


def test_a_module_list_of_teachers_is_a_list_and_a_module_without_forward_is_refused():
    teachers, student = nn.ModuleList(nn.Linear(4, 3) for _ in range(2)), nn.Linear(4, 3)
    criterion, x, y = kdloss.MultiTeacherKD(), torch.randn(2, 4), torch.tensor([0, 2])
    loss = kdloss.Distiller(teachers, criterion)(student, x, labels=y).loss
    torch.testing.assert_close(loss, kdloss.Distiller([*teachers], criterion)(student, x, labels=y).loss)
    assert criterion.prepare(student, teachers) is criterion
    for wrong in (nn.ModuleDict({"a": student}), nn.Module()):
        with pytest.raises(TypeError, match=f"a {type(wrong).__name__} has no forward.*a list of models"):
            kdloss.Distiller(wrong, kdloss.VanillaKD())
    with pytest.raises(TypeError, match=r"a ModuleList has no forward.*a list of models"):
        kdloss.Teacher(teachers)


@pytest.mark.parametrize("call", ["__call__", "prepare"])
def test_a_call_without_the_student_is_refused_and_says_that_it_comes_first(call):
    distill = kdloss.Distiller(torch.nn.Linear(2, 3), kdloss.Logits())
    with pytest.raises(TypeError, match=r"the student first, distill\(student, \*\*batch\).*got Tensor"):
        getattr(distill, call)(torch.zeros(4, 2))
