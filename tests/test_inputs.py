"""Which inputs of a batch reach student and teacher; the expected values come from direct calls of the models."""

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import batch, build
from torch import nn
from versions import since_torch

import kdloss
from kdloss.hf import DistillationTrainer

VOCAB = 30


class Reader(nn.Module):
    """A classifier that takes input_ids only; its subclass `OfPairs` also takes segments and adds them to the ids."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, classes)

    def forward(self, input_ids):
        return {"logits": self.head(self.embedding(input_ids).mean(1))}


class OfPairs(Reader):
    def forward(self, input_ids, token_type_ids=None):
        segments = 0 if token_type_ids is None else token_type_ids
        return super().forward((input_ids + 7 * segments) % VOCAB)


def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (4, 6), generator=generator)
    segments = torch.zeros_like(ids)
    segments[:, 3:] = 1
    return ids, segments, torch.tensor([0, 1, 2, 1])


def kl(student, teacher):
    s, t = student["logits"].double().log_softmax(-1), teacher["logits"].detach().double().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


CRITERION = {"temperature": 1.0, "alpha": 0.0}


def test_an_input_reaches_the_teacher_that_names_it_and_not_the_student_that_does_not():
    ids, segments, y = inputs()
    student, teacher = Reader(), OfPairs(seed=1)
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))(
        student, input_ids=ids, token_type_ids=segments, labels=y
    )
    expected = kl(student(ids), teacher(ids, segments))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected - kl(student(ids), teacher(ids))) > 1e-3
    gradients = [torch.autograd.grad(x, list(student.parameters())) for x in (out.loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("teacher", [Reader(seed=1), Reader(seed=1).forward], ids=["module", "function"])
def test_an_input_that_the_teacher_does_not_name_reaches_only_the_student(teacher):
    ids, segments, y = inputs()
    student = OfPairs()
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))(
        student, input_ids=ids, token_type_ids=segments, labels=y
    )
    expected = kl(student(ids, segments), teacher(ids))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_of_several_teachers_gets_the_inputs_that_it_names():
    ids, segments, y = inputs()
    student, teachers = Reader(), [Reader(seed=1), OfPairs(seed=2)]
    criterion = 1.0 * kdloss.Logits() + 1.0 * kdloss.Logits(teacher=1, name="second")
    out = kdloss.Distiller(teachers, criterion)(student, input_ids=ids, token_type_ids=segments, labels=y)
    expected = kl(student(ids), teachers[0](ids)) + kl(student(ids), teachers[1](ids, segments))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_input_that_no_model_takes_is_named_in_an_error():
    ids, segments, y = inputs()
    distill = kdloss.Distiller(Reader(), kdloss.VanillaKD())
    with pytest.raises(TypeError, match=r"no model reads \['token_type_ids'\]: Reader takes \['input_ids'\]"):
        distill(Reader(), input_ids=ids, token_type_ids=segments, labels=y)
    by_function = kdloss.Distiller(kdloss.Teacher(Reader(), inputs=lambda b: b["input_ids"]), kdloss.VanillaKD())
    assert by_function(Reader(), input_ids=ids, token_type_ids=segments, labels=y).loss.isfinite()


def test_an_input_that_one_teacher_names_does_not_reach_models_that_take_any():
    class Any(Reader):
        def forward(self, input_ids, **others):
            assert not others
            return super().forward(input_ids)

    class Other(Reader):
        def forward(self, teacher_ids):
            return super().forward(teacher_ids)

    ids, _, y = inputs()
    criterion = 1.0 * kdloss.Logits() + 1.0 * kdloss.Logits(teacher=1, name="second")
    teachers, student = [Any(seed=1), Other(seed=2)], Any()
    out = kdloss.Distiller(teachers, criterion)(student, input_ids=ids, teacher_ids=ids.flip(0), labels=y)
    expected = kl(student(ids), teachers[0](ids)) + kl(student(ids), teachers[1](ids.flip(0)))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@since_torch(2, 6)  # before, transformers reads a packed row as one document
@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_packed_rows_are_refused_unless_both_models_take_position_ids():
    teacher, student = build("llama", depth=2).eval(), build("llama", depth=1, seed=1).eval()
    docs = [torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[9, 8, 7]])]
    packed = {"input_ids": torch.cat(docs, 1), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])}
    labels = packed["input_ids"].clone()
    labels[0, [0, 5]] = -100
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))(student, **packed, labels=labels)
    logits = [[{"logits": m(d).logits[:, :-1].flatten(0, 1)} for d in docs] for m in (student, teacher)]
    separate = [kl(s, t) * len(s["logits"]) for s, t in zip(*logits, strict=True)]
    assert out.loss.item() == pytest.approx((sum(separate) / 6).item(), rel=1e-4)
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=61, hidden_size=8, n_layer=1, n_head=2))
    for blind in (bloom, lambda input_ids: bloom(input_ids)):  # the first takes any keyword, but ignores position_ids
        with pytest.raises(ValueError, match=r"teacher \(.* takes no position_ids, .* a packed row"):
            kdloss.Distiller(blind, kdloss.VanillaKD())(student, **packed, labels=labels)
    with pytest.raises(ValueError, match=r"student \(BloomForCausalLM takes .* takes no position_ids"):
        kdloss.Distiller(teacher, kdloss.VanillaKD())(bloom, **packed, labels=labels)
    explicit = kdloss.Teacher(bloom, inputs=lambda b: {"input_ids": b["input_ids"]})
    assert kdloss.Distiller(explicit, kdloss.VanillaKD())(student, **packed, labels=labels).loss.isfinite()


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_padded_rows_are_refused_for_a_teacher_without_attention_mask():
    student, net = build("bert", depth=1).eval(), build("bert", depth=1, seed=1).eval()

    def teacher(input_ids):
        return net(input_ids).logits

    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))
    padded = batch("bert")
    with pytest.raises(ValueError, match="takes no attention_mask and would read padding"):
        distill(student, **padded)
    unpadded = {name: x[:1] for name, x in padded.items()}
    expected = kl({"logits": student(**unpadded).logits}, {"logits": teacher(unpadded["input_ids"])})
    assert distill(student, **unpadded).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_cka_gives_each_model_the_inputs_that_it_names():
    class Deep(Reader):
        def __init__(self, seed):
            super().__init__(seed=seed)
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, input_ids):
            h = self.embedding(input_ids)
            for block in self.blocks:
                h = block(h)
            return {"logits": self.head(h)}

    class OfSegments(Deep):
        def forward(self, input_ids, token_type_ids=None):
            return super().forward((input_ids + 7 * (0 if token_type_ids is None else token_type_ids)) % VOCAB)

    ids, segments, _ = inputs()
    student, teacher = Deep(0), OfSegments(1)
    both = {"input_ids": ids, "token_type_ids": segments}
    found = kdloss.analysis.cka_matrix(student, teacher, [both]).values

    class AddsSegments(Deep):  # adds the same segments to the ids itself
        def forward(self, input_ids):
            return super().forward((input_ids + 7 * segments) % VOCAB)

    torch.testing.assert_close(found, kdloss.analysis.cka_matrix(student, AddsSegments(1), [{"input_ids": ids}]).values)
    assert not torch.equal(found, kdloss.analysis.cka_matrix(student, teacher, [{"input_ids": ids}]).values)
    with pytest.raises(TypeError, match=r"no model reads \['other'\]"):
        kdloss.analysis.cka_matrix(student, teacher, [{"input_ids": ids, "other": ids}])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns
def test_the_inputs_of_a_wrapped_model_are_those_of_the_model_inside():
    model = build("gpt2", depth=1)
    from peft import LoraConfig, get_peft_model

    expected = kdloss._inputs.taken_by(model)
    assert {"input_ids", "position_ids"} <= set(expected[0])
    adapted = get_peft_model(build("gpt2", depth=1), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for wrapped in (torch.compile(model, backend="eager"), adapted):
        assert kdloss._inputs.taken_by(wrapped) == expected
    assert kdloss._inputs.taken_by(torch.jit.trace(Reader(), inputs()[0], strict=False)) == (["input_ids"], False)
    assert kdloss._inputs.taken_by(max) == ([], True)  # without a signature, it may take any


@pytest.mark.parametrize("by_function", [False, True], ids=["named", "by a function"])
def test_the_trainer_keeps_the_teachers_columns_and_evaluates_without_them(by_function, tmp_path):
    class Student(Reader):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)["logits"]
            return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})

    ids, segments, y = inputs()
    student, net = Student(), OfPairs(seed=1)
    read = {"token_type_ids": segments.tolist()}
    teacher = kdloss.Teacher(net, inputs=lambda b: (b["input_ids"], b["token_type_ids"])) if by_function else net
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": y.tolist(), **read})
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    distillation = {"teacher": teacher, "criterion": kdloss.VanillaKD(**CRITERION)}
    trainer = DistillationTrainer(student, arguments, train_dataset=data, eval_dataset=data, **distillation)
    expected = kl(student(ids, y), net(ids, segments)).item()
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(student(ids, y)["loss"].item(), rel=1e-5)


# -- inputs that have the name of a keyword of the loss, and labels -------------------------------------


class Tagger(nn.Module):
    """A tagger of frames whose own input is called like a keyword of the loss."""

    def __init__(self, name, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 5)
        forward = lambda x, given=None: self.compute(x, given)  # noqa: E731
        self.forward = eval(f"lambda x, {name}=None: forward(x, {name})", {"forward": forward})

    def compute(self, x, given):
        h = self.body(x).relu()
        return self.head(h if given is None else h + (h * given[..., None]).sum(1, keepdim=True))


FRAMES, TAGS = torch.randn(6, 7, 3), torch.arange(42).reshape(6, 7) % 5
KEPT = torch.arange(42).reshape(6, 7) % 3 > 0


@pytest.mark.parametrize("name", ["mask", "feature_mask", "index", "teacher"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_keyword_of_the_loss_that_a_model_names_too_is_refused(name, whose):
    names = (name, "other") if whose == "student" else ("other", name)
    model = kdloss.Distillation(Tagger(names[0]), Tagger(names[1], 1), kdloss.VanillaKD(causal=False))
    with pytest.raises(TypeError, match=rf"{name}=\.\.\. is a keyword of the loss, and .* Tagger has.*by position"):
        model(FRAMES, labels=TAGS, **{name: KEPT})
    if name != "teacher":
        with pytest.raises(TypeError, match=rf"{name}=\.\.\. is a keyword of the loss"):
            model.prepare(FRAMES, **{name: KEPT})


def test_an_input_that_has_the_name_of_a_keyword_of_the_loss_is_passed_by_position_beside_it():
    student, teacher = Tagger("mask"), Tagger("mask", 1)
    model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(1.0, 0.5, causal=False))
    for given in (KEPT, None):
        for counted in (None, ~KEPT):
            loss = model(FRAMES, given, labels=TAGS, mask=counted).loss
            s, t = student.compute(FRAMES, given), teacher.compute(FRAMES, given).detach()
            keep = torch.ones_like(KEPT) if counted is None else counted
            own = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)[keep].mean()
            expected = 0.5 * F.cross_entropy(s[keep], TAGS[keep]) + 0.5 * own
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(*(torch.autograd.grad(x, [*student.parameters()]) for x in (loss, expected)))


def test_a_teacher_with_inputs_of_its_own_may_name_a_keyword_of_the_loss():
    teacher = kdloss.Teacher(Tagger("mask", 1), inputs=lambda x: (x, KEPT))
    model = kdloss.Distillation(Tagger("other"), teacher, kdloss.VanillaKD(1.0, 0.0, causal=False))
    loss = model(FRAMES, labels=TAGS, mask=KEPT).loss
    s, t = model.student(FRAMES), teacher.module(FRAMES, KEPT)
    expected = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)[KEPT].mean()
    torch.testing.assert_close(loss, expected)


class Margin(nn.Module):
    """A classifier like ArcFace, which makes the logits of the labels smaller."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x, labels=None):
        z = self.head(x)
        return z if labels is None else z - 2 * F.one_hot(labels, 5)


def test_a_student_whose_logits_depend_on_labels_is_reported_once_until_it_gets_them_by_position(caplog):
    x, y, student = FRAMES[:, 0], TAGS[:, 0], Margin()
    teacher = kdloss.Teacher(nn.Linear(3, 5), inputs=lambda x, y: x)
    model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(1.0, 0.5))
    loss = model(x, y, labels=y).loss
    t = teacher.module(x).detach()
    s = student.head(x) - 2 * F.one_hot(y, 5)
    own = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(s, y) + 0.5 * own)
    assert not caplog.messages
    model = kdloss.Distillation(student, nn.Linear(3, 5), kdloss.VanillaKD())
    for _ in range(2):
        model(x, labels=y)
    (message,) = caplog.messages
    assert "the forward of Margin takes labels and got none" in message
    assert "model(x, y, labels=y)" in message


def test_labels_of_models_that_return_their_own_loss_are_not_reported(caplog):
    class OfLoss(Margin):
        def forward(self, x, labels=None):
            z = self.head(x)
            return {"logits": z, "loss": None if labels is None else F.cross_entropy(z, labels)}

    for criterion in (kdloss.VanillaKD(), kdloss.Task() + kdloss.Logits()):
        kdloss.Distillation(OfLoss(), nn.Linear(3, 5), criterion)(FRAMES[:, 0], labels=TAGS[:, 0])
    assert not [m for m in caplog.messages if "takes labels" in m]
