"""Which inputs of a batch reach student and teacher; the expected values come from direct calls of the models."""

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import batch, build
from torch import nn
from versions import since_torch
from watching import as_on_an_accelerator

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


def packed_row(*lengths):
    """A row of documents of these lengths, and its labels."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def of_lfm2(seed):
    torch.manual_seed(seed)
    settings = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    kinds = ["conv", "full_attention"]
    config = hf.Lfm2Config(num_hidden_layers=2, num_key_value_heads=2, layer_types=kinds, **settings)
    return hf.Lfm2ForCausalLM(config)


def enlarged(model):
    """The model with weights as large as those of a trained one, so that a document's context matters."""
    for weight in (p for p in model.parameters() if p.ndim > 1):
        weight.data *= 10
    return model


BLIND = {name: lambda name=name: build(name, depth=2) for name in ("opt", "roberta", "bert")} | {
    "lfm2": lambda: of_lfm2(0)
}


@since_torch(2, 6)
@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.filterwarnings("ignore:.*add `is_decoder=True.*")
@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_names_position_ids_and_reads_packed_documents_as_one_is_refused(name, dtype):
    row, blind, other = packed_row(5, 4), BLIND[name]().to(dtype), build("llama", depth=1, seed=1).to(dtype)
    with torch.no_grad():
        alone = blind.eval()(row["input_ids"][:, 5:]).logits
        assert (blind(row["input_ids"], position_ids=row["position_ids"]).logits[:, 5:] - alone).abs().max() > 1e-4
    criterion = kdloss.VanillaKD(causal=True, **CRITERION)
    for student, teacher, whose in ((other, blind, "teacher"), (blind, other, "student")):
        words = rf"the {whose} \({type(blind).__name__}\) reads the documents of a packed row as one.*again at \[0, 5\]"
        distill = kdloss.Distiller(teacher, criterion)
        for _ in range(2):  # the error isn't forgotten
            with pytest.raises(ValueError, match=words + ".*; give it padded rows"):
                distill(student, **row)
        positions = torch.arange(9)[None]
        assert distill(student, **row | {"position_ids": positions}).loss.isfinite()  # one document
    with pytest.raises(ValueError, match="reads the documents of a packed row as one"):
        kdloss.analysis.cka_matrix(build("llama", depth=2), blind, [row])


@since_torch(2, 6)
@pytest.mark.parametrize("beside", ["attention_mask", "use_cache"])
def test_a_mask_or_a_cache_beside_packed_documents_is_refused(beside):
    row = packed_row(5, 4)
    student, teacher = build("llama", depth=1).double().eval(), build("llama", depth=2, seed=1).double().eval()
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))
    given = {"attention_mask": torch.ones_like(row["input_ids"])} if beside == "attention_mask" else {"use_cache": True}
    assert distill(student, **row).loss.isfinite()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"student .* as one.*leave out {beside}, beside which"):
            distill(student, **row, **given)
    assert distill(student, **row, use_cache=False).loss.isfinite()


@since_torch(2, 6)
def test_a_function_around_a_model_with_a_cache_is_refused_and_accepted_without_it():
    row, student, model = packed_row(5, 4), build("llama", depth=1), build("llama", depth=2, seed=1)

    def teacher(**settings):
        return lambda input_ids, position_ids: model(input_ids=input_ids, position_ids=position_ids, **settings)

    with pytest.raises(ValueError, match=r"leave out use_cache=True \(of the model inside"):
        kdloss.Distiller(teacher(use_cache=True), kdloss.VanillaKD())(student, **row)
    assert kdloss.Distiller(teacher(use_cache=False), kdloss.VanillaKD())(student, **row).loss.isfinite()


@since_torch(2, 6)
def test_an_attention_pattern_of_four_axes_says_itself_which_documents_are_seen():
    row, document = packed_row(5, 4), torch.tensor([0] * 5 + [1] * 4)
    student, teacher = build("llama", depth=1).double().eval(), build("llama", depth=2, seed=1).double().eval()
    seen = (document[:, None] == document) & torch.ones(9, 9).tril().bool()
    pattern = torch.zeros(9, 9).double().masked_fill(~seen, torch.finfo(torch.float64).min)[None, None]
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))
    losses = [distill(student, **row, **mask).loss for mask in ({}, {"attention_mask": pattern})]
    torch.testing.assert_close(*losses)
    weight = student.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


@since_torch(2, 6)
@pytest.mark.parametrize("where", ["by keyword", "by position", "as embeddings", "in bfloat16", "all alike"])
def test_separated_documents_are_accepted_however_they_are_given(where):
    row = packed_row(5, 4)
    student, teacher = build("llama", depth=1, seed=1), build("llama", depth=1)
    ids, positions, args = row.pop("input_ids"), row.pop("position_ids"), ()
    named = {"input_ids": ids, "position_ids": positions}
    if where == "by position":
        args, named = (ids, None, positions), {}
    elif where == "as embeddings":
        named = {"inputs_embeds": student.get_input_embeddings()(ids), "position_ids": positions}
    elif where == "in bfloat16":
        student, teacher = enlarged(student).bfloat16(), enlarged(teacher).bfloat16()
    elif where == "all alike":
        named["input_ids"] = torch.full_like(ids, 7)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(causal=True, **CRITERION))
    assert distill(student, *args, **named, **row).loss.isfinite()
    with pytest.raises(ValueError, match="leave out use_cache"):
        distill(student, *args, **named, **row, use_cache=True)
    blind = kdloss.Distiller(
        lambda *args, **inputs: teacher(*args, **inputs, use_cache=True), kdloss.VanillaKD(causal=True)
    )
    if not args:  # a function's positional inputs have no names
        with pytest.raises(ValueError, match=r"teacher \(<lambda>\) reads the documents of a packed row as one"):
            blind(student, **named, **row)


class Counted(nn.Module):
    """A model that counts its passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.passes += 1
        return self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)


@since_torch(2, 6)
@pytest.mark.parametrize("several", [False, True], ids=["one process", "several"])
def test_documents_are_compared_once_in_the_same_passes_on_every_process(several, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    rows = [packed_row(5, 4), packed_row(9)]
    counts = []
    for first, second in (rows, rows[::-1]):
        student, teacher = Counted(build("llama", depth=1)), Counted(build("llama", depth=1, seed=1))
        distill = kdloss.Distiller(teacher, kdloss.VanillaKD(causal=True, **CRITERION))
        for row in (first, second, second):
            for model in (student, teacher):
                before = model.passes
                distill(student, **row)
                counts.append(model.passes - before)
    once, measured = [1], [3]
    if several:
        assert counts == 2 * ([*measured, *once, *once, *once, *once, *once])
    else:
        assert counts == [*measured, 1, 1, 1, 1, 1, 1, 1, *measured, 1, 1, 1]


@since_torch(2, 6)
def test_documents_are_looked_at_in_the_first_batch_only_on_an_accelerator(monkeypatch):
    row, student = packed_row(5, 4), build("llama", depth=1)
    distill = kdloss.Distiller(build("llama", depth=1, seed=1), kdloss.VanillaKD(causal=True, **CRITERION))
    as_on_an_accelerator(monkeypatch)
    distill(student, **row | {"position_ids": torch.arange(9)[None]})
    looked = []
    monkeypatch.setattr(kdloss._packing, "_last_start", lambda *batch: looked.append(batch))
    distill(student, **row)
    assert not looked


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_position_ids_of_padded_rows_are_no_packed_documents(side):
    given = packed_row(9)
    mask = torch.ones_like(given["input_ids"])
    mask[:, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    for filler in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
        batch = given | {"attention_mask": mask, "position_ids": positions}
        distill = kdloss.Distiller(build("opt", depth=1, seed=1), kdloss.VanillaKD(**CRITERION))
        student = build("opt", depth=1)
        assert distill(student, **batch).loss.isfinite()
        with pytest.raises(ValueError, match=r"student .* as one.*leave out attention_mask"):  # and so tell nothing
            distill(student, **packed_row(5, 4), attention_mask=torch.ones_like(mask))


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


def test_tokens_given_by_position_are_translated_to_the_teachers_ids_as_those_given_by_name():
    ids, _, _ = inputs()
    student, teacher = Reader(VOCAB), Reader(VOCAB, seed=1)
    theirs = torch.arange(VOCAB).flip(0)
    criterion = kdloss.VanillaKD(**CRITERION, vocabulary=kdloss.TokenMap(torch.arange(VOCAB), theirs))
    expected = kl(student(ids), {"logits": teacher(theirs[ids])["logits"][:, theirs]})
    assert abs(expected - kl(student(ids), {"logits": teacher(ids)["logits"][:, theirs]})) > 1e-3
    for args, named in (((ids,), {}), ((), {"input_ids": ids})):
        loss = kdloss.Distiller(teacher, criterion)(student, *args, **named).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_decoder_inputs_given_by_position_are_not_made_from_the_labels():
    student, teacher = build("t5", depth=1).eval(), build("t5", depth=1, seed=1).eval()
    given = batch("t5")
    ids, mask, labels = (given[name] for name in ("input_ids", "attention_mask", "labels"))
    decoder = labels.clamp_min(0).flip(1)
    out = kdloss.Distiller(teacher, kdloss.VanillaKD(**CRITERION))(student, ids, mask, decoder, labels=labels)
    both = [{"logits": m(ids, mask, decoder).logits[labels != -100]} for m in (student, teacher)]
    assert out.loss.item() == pytest.approx(kl(*both).item(), rel=1e-4)


def test_a_mask_given_by_position_that_the_teacher_would_take_for_another_input_is_refused():
    class Masked(Reader):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    class OtherOrder(Reader):
        def forward(self, input_ids, token_type_ids=None, attention_mask=None):
            return super().forward(input_ids)

    ids, _, y = inputs()
    for teacher in (OtherOrder(seed=1), OfPairs(seed=1)):
        distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
        words = (
            rf"attention_mask to the student \(Masked\) and token_type_ids to the teacher \({type(teacher).__name__}\)"
        )
        with pytest.raises(TypeError, match=words + r".*give it by name: attention_mask=\.\.\."):
            distill(Masked(), ids, torch.ones_like(ids), labels=y)
        assert distill(Masked(), ids, labels=y).loss.isfinite()
    of_pairs = kdloss.Teacher(OfPairs(seed=1), inputs=lambda ids, mask: (ids,))
    assert kdloss.Distiller(of_pairs, kdloss.VanillaKD())(Masked(), ids, torch.ones_like(ids), labels=y).loss.isfinite()


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_cka_reads_a_mask_given_by_position_as_one_given_by_name():
    student, teacher = build("bert", depth=2).eval(), build("bert", depth=3, seed=1).eval()
    padded = batch("bert")
    ids, mask = padded["input_ids"], padded["attention_mask"]
    named = kdloss.analysis.cka_matrix(student, teacher, [{"input_ids": ids, "attention_mask": mask}]).values
    torch.testing.assert_close(kdloss.analysis.cka_matrix(student, teacher, [(ids, mask)]).values, named)


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
