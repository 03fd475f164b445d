"""Models whose classes differ in order or in name, against float64 values by hand."""

import copy
import logging

import datasets
import pytest
import torch
import transformers as hf
from families import batch, build
from tokenizers import Tokenizer, models

import kdloss
import kdloss.cache

NLI = ["contradiction", "neutral", "entailment"]


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def bert(kind, names, seed=0):
    torch.manual_seed(seed)
    return getattr(hf, f"BertFor{kind}Classification")(
        hf.BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.5, **named(names),
        )
    ).eval()  # fmt: skip


def vit(names, seed=0):
    torch.manual_seed(seed)
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8, initializer_range=0.5, **named(names),
        )
    ).eval()  # fmt: skip


def resnet(names, seed=0):
    torch.manual_seed(seed)
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **named(names))
    ).eval()


TEXT = {"input_ids": torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(1))}
IMAGES = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
Y = torch.tensor([0, 1, 2])
MODELS = {
    "sequence": (lambda names, seed: bert("Sequence", names, seed), TEXT | {"labels": Y}),
    "token": (lambda names, seed: bert("Token", names, seed), TEXT | {"labels": TEXT["input_ids"] % 3}),
    "vit": (vit, IMAGES | {"labels": Y}),
    "resnet": (resnet, IMAGES | {"labels": Y}),
}


def kl(student, teacher):
    s, t = student.double().log_softmax(-1), teacher.detach().double().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


def without_labels(inputs):
    return {name: x for name, x in inputs.items() if name != "labels"}


def same(out, expected, student):
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-7)
    slopes = [torch.autograd.grad(x, [*student.parameters()], allow_unused=True) for x in (out.loss, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("teachers", [[NLI], [[n.upper() for n in NLI]], [["neutral", "entailment", "contradiction"]]])
def test_a_teachers_classes_are_compared_in_the_students_order(kind, teachers, caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    make, inputs = MODELS[kind]
    (names,) = teachers
    student, teacher = make(NLI[::-1], 0), make(names, 1)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0))
    order = [[n.casefold() for n in names].index(n) for n in NLI[::-1]]
    expected = kl(student(**without_labels(inputs)).logits, teacher(**without_labels(inputs)).logits[..., order])
    same(distill(student, **inputs), expected, student)
    distill(student, **inputs)
    messages = [r.getMessage() for r in caplog.records if "order" in r.getMessage()]
    assert messages == [
        "teacher 0 has the student's classes in another order: paired by name, entailment, neutral, contradiction"
    ]


def test_a_custom_term_gets_the_teachers_classes_in_the_students_order():
    class Gap(kdloss.terms.Term):
        def loss(self, step):
            return (step.student_logits() - step.teacher_logits()).square().sum(-1)

    make, inputs = MODELS["sequence"]
    student, teacher = make(NLI[::-1], 0), make(NLI, 1)
    s, t = (model(**without_labels(inputs)).logits for model in (student, teacher))
    out = kdloss.Distiller(teacher, 1.0 * Gap(teacher=0))(student, **inputs)
    same(out, (s.double() - t.detach().double()[..., [2, 1, 0]]).square().sum(-1).mean(), student)


def test_each_of_several_teachers_may_have_another_order():
    make, inputs = MODELS["sequence"]
    student, teachers = make(NLI, 0), [make(NLI[::-1], 1), make(NLI, 2)]
    distill = kdloss.Distiller(teachers, kdloss.MultiTeacherKD(alpha=0.0, temperature=1.0))
    first, second = (t(**without_labels(inputs)).logits.softmax(-1) for t in teachers)
    mixture = (first[:, [2, 1, 0]] + second) / 2
    same(distill(student, **inputs), kl(student(**without_labels(inputs)).logits, mixture.log()), student)


@pytest.mark.parametrize("k", [2, 3])
def test_classes_of_a_stored_teacher_are_paired_by_name(k, tmp_path):
    make, inputs = MODELS["sequence"]
    student, teacher = make(NLI, 0), make([n.upper() for n in NLI[::-1]], 1)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, "0"))
    data = datasets.Dataset.from_dict({"id": [0, 1, 2], "input_ids": TEXT["input_ids"].tolist()})
    kdloss.cache.write(tmp_path, teacher, data, tokenizer=words, k=k)
    stored = kdloss.cache.open(tmp_path, tokenizer=words)[[0, 1, 2]]
    out = kdloss.Distiller(None, kdloss.VanillaKD(1.0, 0.0))(student, **inputs, teacher=stored)
    teacher_logits = teacher(**without_labels(inputs)).logits[:, [2, 1, 0]]
    live = kdloss.VanillaKD(1.0, 0.0)(
        student(**without_labels(inputs)).logits, kdloss.TopKLogits.of(teacher_logits, k), inputs["labels"]
    )
    torch.testing.assert_close(out.loss, live, rtol=5e-3, atol=1e-3)
    if k == 3:
        expected = kl(student(**without_labels(inputs)).logits, teacher_logits)
        torch.testing.assert_close(out.loss.double(), expected, rtol=5e-3, atol=1e-3)
    other = make(["x", "y", "z"], 0)
    with pytest.raises(ValueError, match="the student alone has"):
        kdloss.Distiller(None, kdloss.VanillaKD(1.0, 0.0))(other, **inputs, teacher=stored)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            NLI,
            NLI[:2],
            r"3 classes and the teacher 2, .* and the student alone has \['entailment'\]; compare over the 2",
        ),
        (NLI[:2], [*NLI, "other"], r"2 classes and the teacher 4, .* the teacher alone has \['entailment', 'other'\]"),
        (["x", "y", "z"], NLI, r"the student alone has \['x', 'y', 'z'\] and the teacher alone has .* the same names"),
    ],
)
def test_different_classes_are_refused_with_their_names(ours, theirs, message):
    make, inputs = MODELS["sequence"]
    inputs = inputs | {"labels": inputs["labels"].clamp(max=1)}
    with pytest.raises(ValueError, match=message) as error:
        kdloss.Distiller(make(theirs, 1), kdloss.VanillaKD())(make(ours, 0), **inputs)
    assert "vocabular" not in str(error.value).replace("vocabulary=", "")


def test_the_token_map_that_the_error_suggests_compares_shared_classes_and_leaves_input_ids_unchanged():
    make, inputs = MODELS["sequence"]
    student, teacher = make(NLI, 0), make(["other", "neutral", "contradiction", "more"], 1)
    shared = kdloss.TokenMap.of(student.config.label2id, teacher.config.label2id)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0, vocabulary=shared))
    s, t = student(**without_labels(inputs)).logits[:, [0, 1]], teacher(**without_labels(inputs)).logits[:, [2, 1]]
    same(distill(student, **inputs), kl(s, t), student)


def test_classes_without_names_are_compared_in_the_models_order_and_this_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="kdloss")
    make, inputs = MODELS["sequence"]
    student, teacher = make([f"LABEL_{i}" for i in range(3)], 0), make(NLI[::-1], 1)
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0))(student, **inputs)
    same(out, kl(student(**without_labels(inputs)).logits, teacher(**without_labels(inputs)).logits), student)
    assert "(entailment, neutral, contradiction) and the student doesn't: both are assumed" in caplog.text


def test_class_names_are_ignored_where_the_logits_are_over_a_vocabulary():
    """A language model may keep the class names of the classifier that it was made from."""
    student, teacher = build("bert", depth=1), build("bert", depth=1, seed=1)
    inputs = batch("bert")
    plain = kdloss.Distiller(teacher, kdloss.VanillaKD())(student.eval(), **inputs).loss
    student.config.id2label, teacher.config.id2label = dict(enumerate(NLI)), dict(enumerate(NLI[::-1]))
    torch.testing.assert_close(kdloss.Distiller(teacher, kdloss.VanillaKD())(student, **inputs).loss, plain)


def test_the_error_about_different_numbers_of_classes_fits_any_model():
    with pytest.raises(ValueError, match=r"the student has 3 classes and the teacher 4 .* classes by vocabulary="):
        kdloss.VanillaKD()(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]))


def test_an_encoder_decoder_teacher_gets_ids_of_its_own_vocabulary_in_encoder_and_decoder():
    teacher, student = build("t5", depth=1, seed=2).eval(), build("t5", depth=1).eval()
    renamed, ids = copy.deepcopy(teacher), torch.randperm(61, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for own, old in ((renamed.shared, teacher.shared), (renamed.lm_head, teacher.lm_head)):
            before = old.weight.clone()
            own.weight[ids] = before
    renamed.config.decoder_start_token_id = renamed.config.pad_token_id = int(ids[0])
    inputs = batch("t5")
    plain = kdloss.Distiller(teacher, kdloss.VanillaKD(alpha=0.0))(student, **inputs).loss
    shared = kdloss.TokenMap(torch.arange(61), ids)
    mapped = kdloss.Distiller(renamed, kdloss.VanillaKD(alpha=0.0, vocabulary=shared))(student, **inputs).loss
    torch.testing.assert_close(mapped, plain)
    explicit = inputs | {"decoder_input_ids": inputs["labels"].clamp_min(0)}
    both = [
        kdloss.Distiller(t, kdloss.VanillaKD(alpha=0.0, vocabulary=v))(student, **explicit).loss
        for t, v in ((teacher, None), (renamed, shared))
    ]
    torch.testing.assert_close(*both)
