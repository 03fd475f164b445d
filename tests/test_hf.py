"""`kdloss.hf` on small models: what a distilling Trainer computes, logs and refuses, compared with the stock one."""

import copy
import shutil
import socket

import datasets
import pytest
import torch
import transformers as hf
from families import build
from hf_runs import PLAIN, Ignoring, Strict, as_the_trainer, make, pair, rows, trained, two_steps_of
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback, TrainingArguments
from versions import since_torch

import kdloss
from kdloss.hf import DistillationTrainer, Distilling
from kdloss.hf.criteria import always_cross_entropy, reads_index

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*loss_type=None.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
NEAR = 1 - 1e-9  # an alpha at which the teacher runs but its weight is negligible


# --- students of several kinds and their data ----------------------------------------------------


def tokens():
    return [torch.randint(3, 60, (8,)) for _ in range(8)]


def texts():
    """Texts with unequal numbers of labels, so that a mean of means would differ."""
    return [
        {"input_ids": x, "labels": torch.where(torch.arange(8) < 8 - i % 5, x, -100)} for i, x in enumerate(tokens())
    ]


def classes():
    return [{"input_ids": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(tokens())]


def images():
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.tensor(i % 3)} for i in range(8)]


def model(kind, depth, width, dropout=0.1):
    if kind == "bert":
        shape = {"vocab_size": 61, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": depth}
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return hf.BertForSequenceClassification(hf.BertConfig(**shape, **drop, num_attention_heads=2, num_labels=3))
    if kind == "t5":
        shape = {"vocab_size": 61, "d_model": width, "d_kv": width // 2, "d_ff": width, "num_layers": depth}
        config = hf.T5Config(**shape, num_heads=2, dropout_rate=dropout, decoder_start_token_id=0)
        return hf.T5ForConditionalGeneration(config)
    if kind == "vit":
        shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": depth}
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3, "num_attention_heads": 2}
        return hf.ViTForImageClassification(hf.ViTConfig(**shape, **drop, **size))
    if kind == "llama":
        return build("llama", width=width, depth=depth)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    shape = {"vocab_size": 61, "n_embd": width, "n_layer": depth, "n_head": 2, "n_positions": 16}
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **drop, bos_token_id=0, eos_token_id=1))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        return get_peft_model(gpt2, lora)
    if kind in ("strict", "ignoring"):
        gpt2.__class__ = {"strict": Strict, "ignoring": Ignoring}[kind]
    return gpt2


DATA = {"bert": classes, "vit": images}
KINDS = ["gpt2", "llama", "strict", "ignoring", "bert", "t5", "vit", "lora"]
IGNORING = ["ignoring", "bert", "t5"]  # their own loss ignores num_items_in_batch


class Lines(TrainerCallback):
    """Record the lines that a logging integration gets."""

    def __init__(self):
        self.recorded = []

    def on_log(self, args, state, control, logs, **_):
        self.recorded.append(dict(logs))


def run_trainer(
    kind,
    folder,
    criterion=None,
    dropout=0.0,
    of=DistillationTrainer,
    distilling=None,
    train=None,
    told=False,
    data=None,
    **settings,
):
    """Train a student; return its weights, the lines of the log, the trainer and the change of the weights.

    `told`: the Trainer is told that the student ignores num_items_in_batch.
    """
    torch.manual_seed(0)
    student, data = model(kind, 2, 16, dropout), data or DATA.get(kind, texts)()
    if told:
        student.accepts_loss_kwargs = False
    defaults = PLAIN | {"max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    defaults |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments = TrainingArguments(str(folder), **(defaults | settings))
    lines, distillation = Lines(), {}
    if criterion is not None:
        torch.manual_seed(7)
        distillation = {"teacher": model("gpt2" if kind == "lora" else kind, 4, 24), "criterion": criterion}
    trainer = (of if distillation else Trainer)(
        student,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[lines],
        **distillation,
        **(distilling or {}),
    )
    before = [p.detach().clone() for p in student.parameters()]
    trainer.train(**train or {})
    after = [p.detach().clone() for p in student.parameters()]
    return after, lines.recorded, trainer, torch.cat([x.flatten() for x in changes(before, after)])


def losses(lines):
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        *((kind, lambda: kdloss.FeatureKD(alpha=1.0)) for kind in ("gpt2", "bert", "t5", "lora")),
        ("gpt2", lambda: kdloss.VanillaKD(alpha=1.0)),
        ("bert", lambda: 1.0 * kdloss.CrossEntropy() + 0.0 * kdloss.Logits()),
        ("t5", lambda: kdloss.Sum(kdloss.Task())),
    ],
)
def test_cross_entropy_alone_equals_the_stock_trainer_bit_for_bit(kind, criterion, tmp_path):
    """Dropout, the order of the data, clipping and accumulation are the same."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    weights, lines, *_ = run_trainer(kind, tmp_path, dropout=0.1, **settings)
    ours, our_lines, trainer, _ = run_trainer(kind, tmp_path, criterion(), dropout=0.1, **settings)
    assert all(map(torch.equal, ours, weights))
    assert losses(our_lines) == losses(lines)
    assert [line.keys() for line in our_lines] == [line.keys() for line in lines]
    assert any(p.requires_grad for p in trainer.criterion.parameters()) == isinstance(
        trainer.criterion, kdloss.FeatureKD
    )


@pytest.mark.parametrize(
    "criterion",
    [
        kdloss.VanillaKD(alpha=NEAR),
        kdloss.VanillaKD(alpha=kdloss.schedules.constant(1.0)),
        2.0 * kdloss.CrossEntropy(),
        kdloss.Sum(kdloss.CrossEntropy(label_smoothing=0.1)),
        kdloss.Sum(kdloss.CrossEntropy(class_weights=torch.ones(3))),
        kdloss.Sum(kdloss.CrossEntropy(take=0)),
        kdloss.Sum(kdloss.CrossEntropy(), ignore_index=0),
        kdloss.Sum(kdloss.CrossEntropy(), causal=False),
        kdloss.CrossEntropy() + kdloss.Task(),
        kdloss.Sum(kdloss.Task(lambda output, labels: output.loss)),
        torch.nn.Identity(),
    ],
)
def test_a_criterion_that_may_be_something_else_is_not_left_to_the_trainer(criterion):
    assert always_cross_entropy(kdloss.VanillaKD(alpha=1.0))
    assert not always_cross_entropy(criterion)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_negligible_teacher_the_trainer_equals_the_stock_trainer_to_a_millionth(kind, micro_batches, tmp_path):
    """It divides by the Trainer's count of labels; by that of batches, if the model ignores the count of labels."""
    settings = {"gradient_accumulation_steps": micro_batches, "max_steps": 2}
    *_, lines, _, change = run_trainer(kind, tmp_path, told=kind in IGNORING, **settings)
    *_, our_lines, _, our_change = run_trainer(kind, tmp_path, kdloss.VanillaKD(alpha=NEAR), **settings)
    assert losses(our_lines) == pytest.approx(losses(lines), rel=1e-6)
    assert change.norm() > 0
    assert (our_change - change).norm() < 1e-5 * change.norm()  # a difference of float32 weights


@pytest.mark.parametrize("kind", ["gpt2", "llama", "strict", "bert", "t5"])
def test_with_the_students_count_of_labels_micro_batches_add_up_to_one_batch(kind, tmp_path):
    def train(size, batches):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "max_steps": 1}
        return run_trainer(kind, tmp_path, kdloss.VanillaKD(), distilling={"count": "student"}, **settings)

    expected, (line, *_), trainer, _ = train(8, 1)
    accumulated, (accumulated_line, *_), *_ = train(2, 4)
    for one, other in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    for name in ("ce", "kd"):
        assert accumulated_line[name] == pytest.approx(line[name], rel=1e-5, abs=1e-7)
    for one in line, accumulated_line:  # transformers 4 rounds it
        assert one["loss"] == pytest.approx(0.5 * one["ce"] + 0.5 * one["kd"], abs=6e-5)
    assert trainer.criterion.components.keys() == {"ce", "kd"}


class Recording(DistillationTrainer):
    """Keep the micro-batches that it trains on."""

    def compute_loss(self, model, inputs, *args, **settings):
        if model.training:
            self.seen = [*getattr(self, "seen", []), dict(inputs)]
        return super().compute_loss(model, inputs, *args, **settings)


@pytest.mark.parametrize("kind", IGNORING)
def test_micro_batches_of_a_student_that_ignores_the_count_are_averaged(kind, tmp_path, caplog):
    """The gradient is that of the mean of their means, computed here; the plain Trainer's may be 4 times as large."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    criterion = kdloss.VanillaKD(temperature=1.0)
    _, (line, *_), trainer, change = run_trainer(kind, tmp_path, criterion, of=Recording, **settings)
    torch.manual_seed(0)
    student, teacher, total = model(kind, 2, 16, 0.0), trainer.distill.teachers[0].module.eval(), 0.0
    for batch in trainer.seen:
        out, labels = student(**batch), batch["labels"]
        with torch.no_grad():
            taught = teacher(**batch).logits
        logits = out.logits
        if kind == "ignoring":
            labels, logits, taught = labels[:, 1:], logits[:, :-1], taught[:, :-1]
        kl = (taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)[labels != -100].mean()
        total = total + (0.5 * out.loss + 0.5 * kl) / 4
    total.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    expected = torch.cat([-0.1 * g.flatten() for g in gradients])
    assert len(trainer.seen) == 4
    assert (change - expected).norm() < 1e-4 * expected.norm()  # a difference of float32 weights
    assert line["loss"] == pytest.approx(total.item(), abs=6e-5)  # transformers 4 rounds it
    stock = Trainer(model(kind, 1, 16), TrainingArguments(str(tmp_path), **PLAIN))
    said = [record.message for record in caplog.records if "ignores num_items_in_batch" in record.message]
    assert len(said) == stock.model_accepts_loss_kwargs
    assert all("takes 4 times as much. count='student'" in line for line in said)


def one_step(
    folder, data, criterion, kind="llama", size=1, of=DistillationTrainer, models=None, count="trainer", **settings
):
    """The change of the student's weights in one step on four examples, the line of the log, and the trainer."""
    student, teacher = models or pair(kind)[:2]
    before = [p.detach().clone() for p in student.parameters()]
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
    trainer = make(
        folder, student, teacher, criterion, data, of=of, logging_steps=1, distilling={"count": count}, **settings
    )
    trainer.train()
    change = [(p.detach() - b).flatten() for p, b in zip(student.parameters(), before, strict=True)]
    return torch.cat(change), trainer.state.log_history[0], trainer


def assert_same_step(one, other):
    assert other[0].norm() > 0
    assert (one[0] - other[0]).norm() < 1e-5 * other[0].norm()  # a difference of float32 weights
    names = [name for name in ("loss", "ce", "kd") if name in other[1]]
    assert [one[1][name] for name in names] == pytest.approx([other[1][name] for name in names], rel=1e-4)


def half_and_half(**settings):
    return kdloss.Sum(0.5 * kdloss.CrossEntropy(), 0.5 * kdloss.Logits(), **settings)


@pytest.mark.parametrize("count", ["trainer", "student"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("left_out", ["attention_mask", "ignore_index", "mask"])
def test_labels_that_the_criterion_leaves_out_are_not_counted(left_out, kind, count, tmp_path):
    """A step equals the one on labels of -100. Its micro-batches have unequal numbers of labels."""
    plain, other = [], []
    for row in rows():
        out = row["labels"] == -100
        row["attention_mask"] = (~out).long() if left_out == "attention_mask" else torch.ones_like(row["labels"])
        plain.append(row)
        other.append({
            "attention_mask": row | {"labels": row["input_ids"]},
            "ignore_index": row | {"labels": row["labels"].masked_fill(out, 0)},
            "mask": row | {"labels": row["input_ids"], "mask": ~out},
        }[left_out])  # fmt: skip
    criterion = half_and_half(**({"ignore_index": 0} if left_out == "ignore_index" else {}))
    expected = one_step(tmp_path, plain, half_and_half(), kind, count=count)
    assert_same_step(one_step(tmp_path, other, criterion, kind, count=count), expected)


@pytest.mark.parametrize("alone", [True, False])
def test_with_padding_on_the_left_the_divisor_is_the_number_of_logits_that_count(alone, tmp_path):
    """The teacher's term leaves out the logits of padding; cross-entropy counts them, and so does the sum of both."""
    data = [row | {"labels": row["input_ids"], "attention_mask": torch.ones_like(row["labels"])} for row in rows()]
    for row, padding in zip(data, (3, 0, 5, 1), strict=True):
        row["attention_mask"][:padding] = 0
    criterion = 1.0 * kdloss.Logits() if alone else half_and_half()
    change, line, _ = one_step(tmp_path, data, criterion, count="student")
    student, teacher, _ = pair("llama")
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        taught = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    kl = (taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    labelled, real = batch["attention_mask"][:, 1:].bool(), batch["attention_mask"][:, :-1].bool()
    assert (labelled.sum().item(), (labelled & real).sum().item()) == (22, 19)
    kl, ce = kl[labelled & real].sum(), ce[labelled].sum()
    loss = kl / 19 if alone else (0.5 * ce + 0.5 * kl) / 22
    loss.backward()
    expected = torch.cat([-0.1 * p.grad.flatten() for p in student.parameters()])
    assert (change - expected).norm() < 1e-4 * expected.norm()
    assert line["loss"] == pytest.approx(loss.item(), abs=6e-5)


def encoder_decoder():
    """An encoder-decoder, and rows whose padding belongs to the encoder's inputs, which are as long as the labels."""
    data = [{"input_ids": x, "labels": y, "attention_mask": torch.ones(8, dtype=torch.long)}
            for x, y in zip(tokens()[:4], tokens()[:4], strict=True)]  # fmt: skip
    for i, row in enumerate(data):
        row["attention_mask"][8 - 2 * i :] = 0
        row["labels"][i + 1 :] = -100
    return [model("t5", 1, 16, 0.0), model("t5", 1, 24)], data, half_and_half()


def classifier():
    models = [model("bert", 1, 16, 0.0), model("bert", 1, 24)]
    return models, [row | {"attention_mask": (torch.arange(8) < 4 + i % 3).long()}
                    for i, row in enumerate(classes()[:4])], half_and_half()  # fmt: skip


def several_labels():
    """A classifier of examples that may have several of the classes: the labels are [B, classes] numbers."""
    models, data, _ = classifier()
    for one in models:
        one.config.problem_type = "multi_label_classification"
    criterion = 0.5 * kdloss.Task() + 0.5 * kdloss.Logits(kdloss.divergences.bernoulli_kl)
    return models, [row | {"labels": torch.tensor([1.0, 0.0, 1.0])} for row in data], criterion


@pytest.mark.parametrize("kind", [encoder_decoder, classifier, several_labels], ids=lambda kind: kind.__name__)
def test_with_the_students_count_micro_batches_take_the_step_of_one_batch_without_a_count(kind, tmp_path):
    torch.manual_seed(3)
    models, data, criterion = kind()
    student, teacher = copy.deepcopy(models)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    loss = kdloss.Distiller(teacher, criterion)(student, **batch).loss
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    expected = torch.cat([-0.1 * g.flatten() for g in gradients])
    change, line, _ = one_step(tmp_path, data, criterion, models=models, count="student")
    assert (change - expected).norm() < 1e-4 * expected.norm()
    assert line["loss"] == pytest.approx(loss.item(), abs=6e-5)


def test_terms_at_different_positions_are_each_divided_by_their_own_number(tmp_path):
    """The step is that of the mean of the batches' means, since no single number divides both."""

    def criterion():
        return 0.5 * kdloss.CrossEntropy() + 0.5 * kdloss.Logits(positions="mask")

    change, line, _ = one_step(tmp_path, rows(), criterion())
    student, teacher, _ = pair("llama")
    distill, total = kdloss.Distiller(teacher, criterion()), 0.0
    for row in rows():
        total = total + distill(student, **{name: x[None] for name, x in row.items()}).loss / 4
    total.backward()
    expected = torch.cat([-0.1 * p.grad.flatten() for p in student.parameters()])
    assert (change - expected).norm() < 1e-4 * expected.norm()
    assert line["loss"] == pytest.approx(total.item(), abs=6e-5)
    with pytest.raises(ValueError, match=r"count='student' divides all terms by one number.*count='trainer'"):
        one_step(tmp_path, rows(), criterion(), count="student")


class Transcribing(torch.nn.Module):
    """A student whose logits stand at frames, and whose labels are transcripts of another length."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 9)

    def forward(self, frames, labels=None):
        logits = self.head(frames)
        return {"loss": logits.square().mean(), "logits": logits}


def test_labels_at_other_positions_than_the_logits_cannot_divide_the_loss(tmp_path):
    data = [{"frames": torch.randn(6, 4), "labels": torch.arange(3)} for _ in range(4)]
    criterion = kdloss.Sum(0.5 * kdloss.Task(), 0.5 * kdloss.Logits(), causal=False)
    models = [Transcribing(), Transcribing()]
    with pytest.raises(ValueError, match=r"labels \(1, 3\) don't stand at the positions of the logits \(1, 6, 9\)"):
        one_step(tmp_path, data, criterion, models=models, count="student")
    _, line, _ = one_step(tmp_path, data, criterion, models=models)
    assert line["loss"] == pytest.approx(0.5 * line["task"] + 0.5 * line["kd"], abs=6e-5)


def test_masks_among_the_columns_are_kept(tmp_path):
    told = [row | {"mask": row["labels"] != -100, "labels": row["input_ids"]} for row in rows()]
    data = datasets.Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in told])
    expected = one_step(tmp_path, rows(), half_and_half(), size=2)
    assert_same_step(one_step(tmp_path, data.with_format("torch"), half_and_half(), size=2), expected)

    def step(**settings):
        data = [row | {"feature_mask": torch.arange(8) < 3} for row in rows()]
        criterion = kdloss.CrossEntropy() + kdloss.Features("last", distance=kdloss.distances.cka)
        return one_step(tmp_path, data, criterion, size=2, **settings)

    assert_same_step(step(), step(remove_unused_columns=False))


def test_a_mask_that_the_trainer_would_not_read_is_refused(tmp_path):
    told = [row | {"mask": row["labels"] != -100} for row in rows()]
    with pytest.raises(ValueError, match=r"the batch has a mask.*left to the Trainer.*labels of -100"):
        one_step(tmp_path, told, kdloss.VanillaKD(alpha=1.0))


def test_what_another_trainer_says_of_its_own_loss_does_not_scale_the_criterions(tmp_path):
    class Averaging(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, *args, **settings):
            return super().compute_loss(*args, **settings)

    class Both(Distilling, Averaging):
        pass

    expected = one_step(tmp_path, rows(), half_and_half())
    assert_same_step(one_step(tmp_path, rows(), half_and_half(), of=Both), expected)


# --- two steps without a Trainer -----------------------------------------------------------------


def exact(kind):
    """A student, its teacher and a criterion, with the models in float64 so that rounding hides no difference."""
    student, teacher, criterion = pair("llama" if kind == "llama" else "gpt2")
    if kind == "strict":
        student.__class__ = Strict
    return student.double(), teacher.double(), criterion


def two_plain_steps(student, teacher, criterion, clip):
    """The change of each weight in two steps on one big batch, without a Trainer."""
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    criterion.double()
    with torch.no_grad():
        for p in criterion.parameters():
            p.fill_(0.1)
    parameters = [*student.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    big = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    before = trained(student, criterion)
    for _ in range(2):
        distill(student, **big).loss.backward()
        if clip:
            clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return changes(before, trained(student, criterion))


def changes(before, after):
    return [a - b for a, b in zip(after, before, strict=True)]


def assert_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert other.norm() > 0


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("kind", "clip"), [("gpt2", 0.0), ("gpt2", 0.5), ("llama", 0.0), ("strict", 0.0)])
def test_projections_are_optimised_zeroed_and_clipped_with_the_student(kind, clip, micro_batches, tmp_path):
    expected = two_plain_steps(*exact(kind), clip)
    student, teacher, criterion = exact(kind)
    trainer = make(
        tmp_path, student, teacher, criterion, max_grad_norm=clip,
        per_device_train_batch_size=4 // micro_batches, gradient_accumulation_steps=micro_batches,
    )  # fmt: skip
    criterion.double()
    with torch.no_grad():
        for p in criterion.parameters():
            p.fill_(0.1)
    before = trained(student, criterion)
    trainer.train()
    assert_near(changes(before, trained(student, criterion)), expected)


@since_torch(2, 6)  # transformers 4.57 refuses to load the state of an optimizer with an older torch
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_and_logs_the_same_terms(kind, tmp_path):
    settings = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 3,
    }
    uninterrupted, lines, *_ = run_trainer(kind, tmp_path, kdloss.FeatureKD(logit_weight=1.0), dropout=0.1, **settings)
    shutil.rmtree(tmp_path / "checkpoint-3")
    resume = {"resume_from_checkpoint": True}
    resumed, later, *_ = run_trainer(
        kind, tmp_path, kdloss.FeatureKD(logit_weight=1.0), dropout=0.1, train=resume, **settings
    )
    assert all(map(torch.equal, resumed, uninterrupted))
    terms = {"ce", "kd", "feature", "eval_ce", "eval_kd", "eval_feature"}
    ends = [{name: x for line in each for name, x in line.items() if name in terms} for each in (lines, later)]
    assert ends[0] == ends[1]
    assert ends[0].keys() == terms
    assert len([line for line in later if "kd" in line]) == 1  # the third step


# --- several processes ---------------------------------------------------------------------------


def run_both(start, target, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start(target, rank, port, str(folder)) for rank in (0, 1)]
    for process in processes:
        process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_with_accumulation_take_the_steps_of_one_big_batch(start, tmp_path):
    (first, evaluated, lines), (second, *_) = run_both(start, two_steps_of, tmp_path)
    assert all(map(torch.equal, first, second))
    student, teacher, criterion = exact("gpt2")
    expected = two_plain_steps(student, teacher, criterion, clip=0.5)
    fresh = [*exact("gpt2")[0].parameters(), *(torch.full_like(p, 0.1) for p in criterion.parameters())]
    assert_near(changes([p.detach() for p in fresh], first), expected)
    student.eval()
    single = [student(**{name: x[None] for name, x in row.items()}).loss.item() for row in rows()]
    assert evaluated["eval_loss"] == pytest.approx(sum(single) / 4, rel=1e-5)
    assert evaluated["eval_ce"] == pytest.approx(sum(single) / 4, rel=1e-5)
    assert {"ce", "kd", "feature"} <= lines[0].keys()
    checkpoint = tmp_path / "checkpoint-2"
    projections = load_file(checkpoint / "criterion.safetensors")
    names = [name for name, _ in criterion.named_parameters()]
    assert all(torch.equal(projections[n], p) for n, p in zip(names, first[-len(names) :], strict=True))
    written = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert written.pop("trainer_state.json") > max(written.values())  # including those of the slower process
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(written)


def test_in_two_processes_the_loss_equals_the_stock_trainers(start, tmp_path):
    for results in run_both(start, as_the_trainer, tmp_path):
        for family in ("gpt2", "strict", "ignoring"):
            (stock, loss, evaluated), (near, our_loss, ours) = (results[family, kind] for kind in ("stock", "near"))
            assert stock.norm() > 0
            assert (near - stock).norm() < 1e-5 * stock.norm()
            assert our_loss == pytest.approx(loss, rel=1e-6)
            assert ours == pytest.approx(evaluated, rel=1e-6)


# --- other batches -------------------------------------------------------------------------------


def test_without_labels_micro_batches_are_averaged(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]  # of equal length, so a mean of means is exact

    def step(size, micro_batches):
        student, teacher, criterion = pair(criterion=kdloss.FeatureKD(alpha=0.0))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        make(tmp_path, student, teacher, criterion, data, ddp_find_unused_parameters=False, **settings).train()
        return trained(student, criterion)

    for one, many in zip(step(4, 1), step(1, 4), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def test_a_run_with_only_ignored_labels_changes_no_weight(tmp_path):
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows()]
    student, teacher, criterion = pair()
    trainer = make(tmp_path, student, teacher, criterion, data, logging_nan_inf_filter=False)
    before = trained(student, criterion)
    assert trainer.train().training_loss == 0
    assert all(map(torch.equal, trained(student, criterion), before))


def test_bf16_is_near_fp32_and_applies_to_the_teacher_but_not_to_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves the value of an earlier run there

    def step(**settings):
        student, teacher, criterion = pair()
        seen = []
        teacher.transformer.h[0].mlp.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        trainer = make(tmp_path, student, teacher, criterion, max_steps=1, **settings)
        before = trained(student, criterion)
        trainer.train()
        after = trained(student, criterion)
        assert all(p.dtype == torch.float32 for p in after)
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]), set(seen)

    (exact, in_full), (near, in_half) = step(), step(bf16=True)
    assert (in_full, in_half) == ({torch.float32}, {torch.bfloat16})
    assert near.isfinite().all()
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < 0.03


class OtherColumn(torch.nn.Module):
    """A teacher that reads a column that the student does not read."""

    def __init__(self):
        super().__init__()
        self.inner = build("gpt2", width=24, depth=1)

    def forward(self, teacher_ids, attention_mask):
        return self.inner(input_ids=teacher_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("packaged", [False, True])
def test_columns_that_a_teacher_reads_are_passed_and_unread_columns_are_dropped(packaged, tmp_path):
    student, _, _ = pair()
    data = [row | {"teacher_ids": row["input_ids"], "comment": torch.zeros(3)} for row in rows()]
    if packaged:
        data = datasets.Dataset.from_list([{n: x.tolist() for n, x in row.items()} for row in data])
    teacher, seen = OtherColumn(), []
    teacher.register_forward_pre_hook(lambda _, args, batch: seen.append(set(batch)), with_kwargs=True)
    trainer = make(tmp_path, student, teacher, kdloss.VanillaKD(), data)
    trainer.train()
    assert {"eval_kd"} <= trainer.evaluate().keys()
    assert trainer.predict(data).predictions.shape == (4, 8, 61)
    assert all(batch == {"teacher_ids", "attention_mask"} for batch in seen)
    assert trainer.args.remove_unused_columns


def test_the_index_of_each_example_is_passed_to_a_distance_that_takes_it(tmp_path):
    """CRD stores a feature per example of the data set. Without such a distance the column is not read."""

    def numbered(student, teacher, index):
        return (student - teacher).square().sum(-1) * index

    assert not reads_index(kdloss.FeatureKD())
    assert reads_index(kdloss.Sum(kdloss.Features("last", distance=numbered)))
    student, teacher, _ = pair()
    criterion = kdloss.CrossEntropy() + 0.1 * kdloss.Features("last", distance=kdloss.distances.CRD)
    data = [row | {"index": torch.tensor(i)} for i, row in enumerate(rows())]
    trainer = make(tmp_path, student, teacher, criterion, data)
    assert reads_index(criterion)
    seen = []
    criterion.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["index"]), with_kwargs=True)
    trainer.train()
    assert all(index.numel() == 4 for index in seen)
    before = {name: x.clone() for name, x in criterion.state_dict().items()}
    trainer.evaluate()  # updates no memory
    assert all(torch.equal(x, before[name]) for name, x in criterion.state_dict().items())


def test_a_teacher_with_a_function_of_the_batch_may_read_any_column(tmp_path):
    data = [row | {"words": row["input_ids"]} for row in rows()]
    teacher = kdloss.Teacher(build("gpt2", width=24, depth=1), inputs=lambda batch: {"input_ids": batch["words"]})
    arguments = TrainingArguments(str(tmp_path), **PLAIN)
    student = pair()[0]
    trainer = DistillationTrainer(student, arguments, teacher=teacher, criterion=kdloss.VanillaKD(), train_dataset=data)
    trainer.train()
    assert arguments.remove_unused_columns  # the user's arguments are not changed


def test_stored_teacher_logits_come_with_the_batch(tmp_path):
    student, teacher, _ = pair()
    with torch.no_grad():
        stored = [teacher.eval()(input_ids=row["input_ids"][None]).logits[0] for row in rows()]
    data = [row | {"number": i} for i, row in enumerate(rows())]

    def collate(examples):
        batch = {name: torch.stack([row[name] for row in examples]) for name in ("input_ids", "labels")}
        logits = torch.stack([stored[row["number"]] for row in examples])
        return batch | {"teacher": kdloss.TopKLogits.of(logits, k=logits.shape[-1])}

    def train(teacher, data, collator):
        trained_student = copy.deepcopy(student)
        trainer = DistillationTrainer(
            trained_student, TrainingArguments(str(tmp_path), **PLAIN), teacher=teacher, criterion=kdloss.VanillaKD(),
            train_dataset=data, eval_dataset=data, data_collator=collator,
        )  # fmt: skip
        return trainer.train().training_loss, trainer.evaluate()["eval_kd"]

    live = [{name: row[name] for name in ("input_ids", "labels")} for row in rows()]
    assert train(None, data, collate) == pytest.approx(train(teacher, live, None), rel=1e-5)


# --- evaluation and logs -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "strict", "llama", "bert", "t5"])
def test_evaluation_reports_the_models_loss_and_each_term(kind, tmp_path):
    _, lines, trainer, _ = run_trainer(kind, tmp_path, kdloss.VanillaKD(temperature=2.0), max_steps=1)
    line = next(line for line in lines if "eval_loss" in line)
    student, (teacher,) = trainer.model.eval(), (t.module.eval() for t in trainer.distill.teachers)
    ce, kd = [], []
    for half in (trainer.eval_dataset[:4], trainer.eval_dataset[4:]):
        batch = {name: torch.stack([row[name] for row in half]) for name in half[0]}
        with torch.no_grad():
            out, teacher_logits = student(**batch), teacher(**batch).logits
        ce.append(out.loss.item())
        labels, logits = batch["labels"], out.logits
        if kind in ("gpt2", "strict", "llama"):
            labels, logits, teacher_logits = labels[:, 1:], logits[:, :-1], teacher_logits[:, :-1]
        logs, probabilities = (logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1)
        kl = (probabilities * (probabilities.log() - logs)).sum(-1)[labels != -100]
        kd.append(4 * kl.mean().item())
    if kind in ("strict", "bert", "t5"):  # for others it may include the Trainer's count of labels
        assert line["eval_loss"] == pytest.approx(sum(ce) / 2, rel=1e-5)
    assert line["eval_ce"] == pytest.approx(sum(ce) / 2, rel=1e-5)
    assert line["eval_kd"] == pytest.approx(sum(kd) / 2, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "strict"])
def test_metrics_get_the_logits_of_the_stock_trainer(kind, tmp_path):
    def predicted(criterion):
        gathered = []
        trainer = run_trainer(kind, tmp_path, criterion, max_steps=1, learning_rate=0.0, eval_strategy="no")[2]
        trainer.compute_metrics = lambda result: gathered.append(result.predictions) or {"seen": 1.0}
        assert trainer.evaluate()["eval_seen"] == 1.0
        return gathered[0]

    assert (predicted(kdloss.FeatureKD(logit_weight=1.0)) == predicted(None)).all()


def test_with_teacher_in_eval_false_evaluation_runs_no_teacher(tmp_path):
    student, teacher, criterion = pair()
    trainer = make(tmp_path, student, teacher, criterion, distilling={"teacher_in_eval": False})
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    assert not {"eval_ce", "eval_kd"} & trainer.evaluate().keys()


def test_a_trainer_that_generates_distils_and_evaluates(tmp_path):
    class Generating(Distilling, hf.Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    student, teacher, data = model("t5", 1, 16), model("t5", 2, 24), texts()
    arguments = hf.Seq2SeqTrainingArguments(str(tmp_path), **PLAIN, predict_with_generate=True, generation_max_length=4)
    seen = []
    trainer = Generating(
        student, arguments, teacher=teacher, criterion=kdloss.FeatureKD(), train_dataset=data, eval_dataset=data,
        compute_metrics=lambda result: seen.append(result.predictions) or {},
    )  # fmt: skip
    trainer.train()
    assert {"eval_loss", "eval_feature"} <= trainer.evaluate().keys()
    assert [predictions.dtype.kind for predictions in seen] == ["i"]  # generated tokens


def test_schedules_advance_once_per_step_and_not_per_micro_batch(tmp_path):
    seen = []
    weight = lambda step: seen.append(step) or 1.0  # noqa: E731
    criterion = kdloss.CrossEntropy() + weight * kdloss.Logits()
    student, teacher, _ = pair()
    make(tmp_path, student, teacher, criterion, per_device_train_batch_size=2, gradient_accumulation_steps=2).train()
    assert sorted(set(seen)) == [0, 1]
    assert criterion.step == 2


def test_a_student_from_model_init_starts_with_new_projections_in_each_run(tmp_path):
    teacher = build("gpt2", width=24, depth=4)
    arguments = TrainingArguments(str(tmp_path), **PLAIN | {"optim": "adamw_torch", "learning_rate": 0.1})
    criterion = kdloss.FeatureKD()
    trainer = DistillationTrainer(
        args=arguments,
        model_init=lambda: build("gpt2", depth=2, seed=1),
        teacher=teacher,
        criterion=criterion,
        train_dataset=rows(),
    )
    first = [p.detach().clone() for p in criterion.parameters()]
    trainer.train()
    ends = [trained(trainer.model, criterion)]
    assert not any(map(torch.equal, first, criterion.parameters()))
    trainer.train()
    ends.append(trained(trainer.model, criterion))
    assert all(map(torch.equal, *ends))


# --- TRL -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:`gradient_checkpointing` is deprecated")
def test_trls_trainer_keeps_its_log_and_with_a_negligible_teacher_its_loss(tmp_path):
    trl = pytest.importorskip("trl")  # not among the oldest versions

    class SFTDistiller(Distilling, trl.SFTTrainer):
        pass

    tokenizer = hf.ByT5Tokenizer()
    sums = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(8)]
    data = datasets.Dataset.from_list(sums)

    def train(criterion):
        shape = {"vocab_size": len(tokenizer), "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
        torch.manual_seed(0)
        teacher, student = (
            hf.LlamaForCausalLM(
                hf.LlamaConfig(hidden_size=w, intermediate_size=w, num_hidden_layers=d, pad_token_id=0, **shape)
            )
            for w, d in ((24, 4), (16, 2))
        )
        settings = PLAIN | {"bf16": False, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        arguments = trl.SFTConfig(
            str(tmp_path), **settings, gradient_accumulation_steps=2, per_device_train_batch_size=2
        )
        distillation = {"teacher": teacher, "criterion": criterion} if criterion else {}
        trainer = (SFTDistiller if criterion else trl.SFTTrainer)(
            student, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **distillation
        )
        trainer.train()
        return trainer.state.log_history

    stock, plain, near, feature = map(
        train, (None, kdloss.VanillaKD(alpha=1.0), kdloss.VanillaKD(alpha=NEAR), kdloss.FeatureKD())
    )
    assert losses(plain) == losses(stock)
    assert losses(near) == pytest.approx(losses(stock), rel=1e-6)
    for line in near, feature:
        assert {"loss", "ce", "entropy", "mean_token_accuracy", "num_tokens"} <= line[0].keys()
        assert {"eval_loss", "eval_ce", "eval_entropy", "eval_mean_token_accuracy"} <= line[1].keys()
    assert near[0]["entropy"] == pytest.approx(stock[0]["entropy"], rel=1e-6)


# --- refused settings ----------------------------------------------------------------------------


def test_several_gpus_in_one_process_are_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), **PLAIN)
    arguments._n_gpu = 2
    student, teacher, criterion = pair()
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        DistillationTrainer(student, arguments, teacher=teacher, criterion=criterion)


def test_a_loss_setting_of_the_trainer_is_refused_with_the_criterions_setting_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"leave out label_smoothing_factor.*CrossEntropy\(label_smoothing="):
        make(tmp_path, *pair(), label_smoothing_factor=0.1)
    trainer = make(tmp_path, *pair(criterion=kdloss.VanillaKD(alpha=1.0)), label_smoothing_factor=0.1)
    assert trainer.train().global_step == 2  # cross-entropy only: the Trainer computes it


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_trained_criterion_is_refused_under_fsdp_and_deepspeed(sharding, tmp_path, monkeypatch):
    processed = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        Trainer, "create_accelerator_and_postprocess", lambda self: processed(self) or setattr(self, sharding, True)
    )
    with pytest.raises(ValueError, match=r"learns projections, which the Trainer doesn't shard.*Accelerate"):
        make(tmp_path, *pair())


def test_an_optimizer_without_the_criterions_parameters_is_refused(tmp_path):
    student, teacher, criterion = pair()
    trainer = make(tmp_path, student, teacher, criterion)
    trainer.optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lacks what the criterion learns.*trainer.criterion.parameters"):
        trainer.train()
    trainer.optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    before = trained(student, criterion)
    trainer.train()
    assert not any(map(torch.equal, before, trained(student, criterion)))


def test_an_unknown_count_is_refused(tmp_path):
    with pytest.raises(ValueError, match="count"):
        make(tmp_path, *pair(), distilling={"count": "labels"})


def test_a_trainer_with_its_own_loss_gets_a_warning_that_the_criterion_replaces_it(tmp_path, caplog):
    class Penalised(Trainer):
        def compute_loss(self, *args, **settings):
            return super().compute_loss(*args, **settings) + 1.0

    class Both(Distilling, Penalised):
        pass

    make(tmp_path, *pair(), of=Both)
    assert "replaces the loss of Penalised" in caplog.text


def test_a_distillation_in_a_distillation_trainer_is_refused(tmp_path):
    student, teacher, criterion = pair(criterion=kdloss.VanillaKD())
    inside = kdloss.Distillation(student, teacher, criterion)
    with pytest.raises(TypeError, match=r"the student is a Distillation.*transformers\.Trainer\(model\)"):
        make(tmp_path, inside, teacher, kdloss.VanillaKD())
