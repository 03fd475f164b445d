"""What a criterion remembers of its last step changes the cost of the next step, but not its result."""

import copy
import gc
import pickle
import weakref

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from versions import since_torch

import kdloss
from kdloss import LazyLogits, TopKLogits, VanillaKD, divergences, schedules
from kdloss.terms import _known, _sweep


def inputs(shape=(6,), classes=5, dtype=torch.float32, kind="classes", mask=False, teacher="tensor", seed=0):
    """The arguments of a criterion; some of them are invalid."""
    draw = torch.Generator().manual_seed(seed)
    student, logits = (torch.randn(*shape, classes, generator=draw).to(dtype) for _ in range(2))
    labels = torch.randint(0, 5, shape, generator=draw)
    if kind == "ignored":
        labels.view(-1)[:1] = -100
    others = {
        "none": None,
        "soft": student.softmax(-1),
        "int32": labels.int(),
        "short": labels.unsqueeze(0),
        "list": labels.tolist(),
    }
    labels = others.get(kind, labels)
    teachers = {
        "tensor": logits,
        "none": None,
        "wide": torch.cat([logits, logits], -1),
        "double": logits.double(),
        "several": [logits, logits],
        "top k": TopKLogits.of(logits, 1),
        "lazy": LazyLogits(logits, torch.eye(classes, dtype=dtype)),
        "whole numbers": logits.long(),
    }
    marks = {"mask": torch.rand(shape, generator=draw) > 0.3} if mask else {}
    return student.requires_grad_(), teachers[teacher], labels, marks


def trained_class_weights(criterion):
    del criterion.terms["ce"].class_weights
    criterion.terms["ce"].class_weights = nn.Parameter(torch.arange(1.0, 8))


CHANGES = {
    "nothing": lambda c: None,
    "alpha": lambda c: setattr(c, "alpha", 0.25),
    "no labels": lambda c: setattr(c, "alpha", 0.0),
    "no teacher": lambda c: setattr(c, "alpha", 1.0),
    "schedule": lambda c: setattr(c, "alpha", schedules.linear(0.0, 1.0, steps=3)),
    "step": lambda c: c.advance(),
    "temperature": lambda c: setattr(c, "temperature", 5.0),
    "cooling": lambda c: setattr(c, "temperature", schedules.linear(4, 1, steps=3)),
    "weight": lambda c: c.weights.update({"kd": type(c.weights["kd"])(torch.tensor(0.3))}),
    "divergence": lambda c: setattr(c.terms["kd"], "divergence", divergences.reverse_kl),
    "between rows": lambda c: setattr(c.terms["kd"], "divergence", divergences.dist),
    "by labels": lambda c: setattr(c.terms["kd"], "divergence", divergences.dkd),
    "vocabulary": lambda c: setattr(c.terms["kd"], "vocabulary", kdloss.truncate),
    "positions": lambda c: setattr(c.terms["kd"], "positions", "mask"),
    "part": lambda c: setattr(c.terms["kd"], "teacher_take", "logits"),
    "smoothing": lambda c: setattr(c.terms["ce"], "label_smoothing", 0.1),
    "class weights": lambda c: setattr(c.terms["ce"], "class_weights", torch.arange(1.0, 6)),
    "more class weights": lambda c: setattr(c.terms["ce"], "class_weights", torch.arange(1.0, 8)),
    "another term": lambda c: c.terms.update({"ce": kdloss.CrossEntropy(label_smoothing=0.5)}),
    "causal": lambda c: setattr(c, "causal", True),
    "sum": lambda c: setattr(c, "reduction", "sum"),
    "none": lambda c: setattr(c, "reduction", "none"),
    "ignored": lambda c: setattr(c, "ignore_index", 3),
    "layout": lambda c: setattr(c, "layout", "b c t"),
    "finite": lambda c: setattr(c, "check_finite", True),
}
BATCHES = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.sampled_from([(6,), (4,), (2, 3), (3, 2), (0,), ()]),
        "classes": st.sampled_from([5, 1]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "kind": st.sampled_from(["classes", "ignored", "none", "soft", "int32", "short", "list"]),
        "mask": st.booleans(),
        "teacher": st.sampled_from(["tensor", "none", "wide", "double", "several", "top k", "lazy", "whole numbers"]),
        "seed": st.integers(0, 3),
    },
)


def outcome(criterion, batch):
    """Loss, gradient and components of a step, or what it raised."""
    student, teacher, labels, marks = inputs(**batch)
    try:
        loss = criterion(student, teacher, labels, **marks)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        return type(error), str(error)
    loss.sum().backward()
    return {"loss": loss.detach(), "gradient": student.grad, **criterion.components}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), BATCHES), min_size=1, max_size=4))
def test_a_used_criterion_gives_or_raises_the_same_as_a_new_one(steps):
    criterion = VanillaKD(temperature=2.0, alpha=0.5)
    for change, batch in steps:
        CHANGES[change](criterion)
        for _ in range(2):
            expected = outcome(copy.deepcopy(criterion), batch)
            found = outcome(criterion, batch)
            if isinstance(expected, tuple):
                assert found == expected
            else:
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", [trained_class_weights, CHANGES["more class weights"]])
def test_changed_class_weights_are_checked_again(change):
    criterion, batch = VanillaKD(), inputs()[:3]
    criterion(*batch)
    change(criterion)
    with pytest.raises(ValueError, match="class weights"):
        criterion(*batch)


def test_a_later_step_may_have_labels_of_another_type():
    criterion, (student, teacher, labels, _) = VanillaKD(alpha=0.0), inputs()
    loss = criterion(student, teacher)
    torch.testing.assert_close(criterion(student, teacher, labels.tolist()), loss)


def test_copies_and_pickles_remember_no_step():
    criterion, batch = VanillaKD(), inputs()[:3]
    loss = criterion(*batch)
    assert criterion._known._key is not None
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other._known._key is None
        torch.testing.assert_close(other(*batch), loss)


def test_a_lazy_step_like_the_last_goes_straight_to_the_sweep_and_a_step_with_another_head_does_not(monkeypatch):
    criterion, hidden, weight = VanillaKD(), torch.randn(6, 4), torch.randn(5, 4)
    teacher, labels = LazyLogits(torch.randn(6, 4), nn.Parameter(weight)), torch.tensor([0, 1, 2, 3, 4, -100])
    criterion(LazyLogits(hidden, weight), teacher, labels)
    swept, cap = [], {"softcap": 0.5}
    monkeypatch.setattr(_known, "sweep", lambda *args, **known: swept.append(args) or _sweep.sweep(*args, **known))
    steps = ({}, True), (cap, False), (cap, True), ({"scale": 2.0}, False), ({"bias": torch.ones(5)}, False)
    for more, known in steps:
        student = LazyLogits(hidden, weight, **more)
        swept.clear()
        found = criterion(student, teacher, labels)
        assert bool(swept) == known
        torch.testing.assert_close(found, VanillaKD()(student.dense(), teacher.dense(), labels))


def test_terms_read_their_own_teachers_in_every_step():
    student, first, second = torch.randn(3, 6, 5)
    criterion = kdloss.Logits(teacher=1, name="second") + kdloss.CrossEntropy() + kdloss.Logits()
    expected = {name: VanillaKD(1.0, alpha=0.0)(student, x) for name, x in (("kd", first), ("second", second))}
    for _ in range(3):
        criterion(student, [first, second], torch.zeros(6, dtype=torch.long))
        torch.testing.assert_close({name: criterion.components[name] for name in expected}, expected)


@pytest.mark.parametrize("kind", ["classes", "ignored"])
def test_a_step_leaves_no_reference_to_its_tensors(kind):
    criterion = VanillaKD()
    for _ in range(2):
        student, teacher, labels, _ = inputs(kind=kind)
        criterion(student, teacher, labels).backward()
        references = [weakref.ref(x) for x in (student, teacher, labels)]
        del student, teacher, labels
        gc.disable()
        try:
            assert [ref() for ref in references] == [None] * 3
        finally:
            gc.enable()


class Counting(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@since_torch(2, 10)  # older torch detaches once more
@pytest.mark.parametrize(("kind", "most"), [("classes", 8), ("ignored", 14)])
def test_a_step_calls_few_operators_outside_the_engine(kind, most, monkeypatch):
    criterion, batch = VanillaKD(), inputs((128,), 10, kind=kind)[:3]
    if kind == "ignored":
        batch[2][:64] = -100
    criterion(*batch)
    rows = int((batch[2] != -100).sum())
    answer = torch.zeros(()), torch.zeros(2, rows)
    monkeypatch.setattr(_sweep, "fused", lambda *_: answer)
    with Counting() as counting:
        criterion(*batch)
    assert len(counting.calls) <= most, counting.calls


def gpt2(blocks, seed, **more):
    torch.manual_seed(seed)
    shape = {"n_embd": 8, "n_head": 2, "vocab_size": 9, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=blocks, **shape, **more)).eval()


def classifiers():
    torch.manual_seed(0)
    shape = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 9,
        "n_positions": 8,
        "num_labels": 3,
        "pad_token_id": 0,
    }
    return [GPT2ForSequenceClassification(GPT2Config(**shape)).eval() for _ in range(2)]


def another_head(student, teacher):
    student.lm_head = nn.Linear(8, 9, bias=False)


def another_block(student, teacher):
    student.transformer.h.append(copy.deepcopy(teacher.transformer.h[0]))
    student.config.n_layer += 1


def a_hook_on_the_head(student, teacher):
    student.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def mixed_modes(student, teacher):
    teacher.train()
    teacher.transformer.h[0].eval()


def permuted_class_names(student, teacher):
    for model, order in ((student, "abc"), (teacher, "cab")):
        model.config.id2label.update(dict(enumerate(order)))


def unmatched_class_names(student, teacher):
    permuted_class_names(student, teacher)
    teacher.config.id2label[0] = "d"


def another_forward(student, teacher):
    before = student.forward
    student.forward = lambda input_ids, labels=None, **more: before(input_ids=input_ids, labels=labels)


CHANGED = [another_head, another_block, a_hook_on_the_head, mixed_modes, another_forward]


@pytest.mark.parametrize("change", [*CHANGED, permuted_class_names, unmatched_class_names])
@pytest.mark.parametrize("features", [False, True])
def test_models_changed_in_place_between_steps_give_the_results_of_a_new_distiller(change, features):
    language = change not in (permuted_class_names, unmatched_class_names)
    student, teacher = (gpt2(2, 0), gpt2(3, 1)) if language else classifiers()
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    batch = {"input_ids": tokens, "labels": tokens if language else torch.tensor([0, 2])}
    criterion = kdloss.FeatureKD(pairing=[(0, 0)], logit_weight=1.0) if features else VanillaKD()
    distill = kdloss.Distiller(teacher, criterion)
    for _ in range(2):
        distill(student, **batch)
    change(student, teacher)
    modes = {module: module.training for module in teacher.modules()}

    def outcome(distill):
        try:
            out = distill(student, **batch)
        except ValueError as error:
            return str(error)
        return [out.loss, *torch.autograd.grad(out.loss, student.transformer.wte.weight)]

    found, expected = outcome(distill), outcome(kdloss.Distiller(teacher, copy.deepcopy(criterion)))
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert modes == {module: module.training for module in teacher.modules()}


def test_a_student_that_now_ends_in_another_kind_of_layer_is_looked_at_again():
    student, teacher = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    distill, x = kdloss.Distiller(teacher, VanillaKD(alpha=0.0)), torch.randn(3, 5, 4)
    for _ in range(2):
        distill(student, x)
    student[0] = nn.Conv1d(5, 5, 1)  # logits of the same shape, but their classes are the second axis now
    with pytest.raises(ValueError, match="second axis"):
        distill(student, x)


def before_an_activation(model):
    model[0] = nn.Conv1d(5, 5, 1)


def inside_a_container(model):
    model[0][0] = nn.Conv1d(5, 5, 1)


def in_the_same_memory(model):
    del model[0][0]
    gc.collect()
    model[0].insert(0, nn.Conv1d(5, 5, 1))


def the_order(model):
    model[0][0], model[0][1] = model[0][1], model[0][0]


def one_of_two_uses(model):
    model[0][2] = model[0][0]


def into_the_next_container(model):
    model[1].insert(0, model[0].pop(1))


@pytest.mark.parametrize(
    ("change", "name", "layers"),
    [
        (before_an_activation, "1", lambda linear, conv: [linear, nn.ReLU()]),
        (inside_a_container, "0", lambda linear, conv: [nn.Sequential(linear, nn.ReLU())]),
        (in_the_same_memory, "0", lambda linear, conv: [nn.Sequential(linear, nn.ReLU())]),
        (the_order, "0", lambda linear, conv: [nn.Sequential(conv, linear)]),
        (one_of_two_uses, "0", lambda linear, conv: [nn.Sequential(conv, linear, linear)]),
        (into_the_next_container, "0", lambda linear, conv: [nn.Sequential(conv, linear), nn.Sequential(nn.ReLU())]),
    ],
)
def test_a_replaced_or_moved_module_changes_what_is_known_of_the_axes_of_a_feature(change, name, layers):
    student, teacher = (
        nn.Sequential(*layers(nn.Linear(4, 4), nn.Conv1d(5, 5, 1)), nn.Flatten(), nn.Linear(20, 4)) for _ in range(2)
    )
    criterion, x = kdloss.Sum(kdloss.Features([name], pairing="same")), torch.randn(3, 5, 4)
    distill = kdloss.Distiller(teacher, criterion)
    for _ in range(2):
        distill(student, x)
    change(student)
    with pytest.raises(ValueError, match="second axis"):
        kdloss.Distiller(teacher, criterion)(student, x)
    with pytest.raises(ValueError, match="second axis"):
        distill(student, x)


def test_a_replaced_block_of_an_encoder_is_still_at_the_positions_of_the_inputs():
    student, teacher = (families.build("t5", seed=seed) for seed in (0, 1))
    distill = kdloss.Distiller(teacher, kdloss.FeatureKD(["encoder.block.0"], pairing="same"))
    inputs = families.batch("t5")
    loss = distill(student, **inputs).loss
    student.encoder.block[0] = copy.deepcopy(student.encoder.block[0])
    torch.testing.assert_close(distill(student, **inputs).loss, loss, rtol=0, atol=0)
