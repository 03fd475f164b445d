"""Trigger every message of docs/errors.md as a user would: each function raises an error or logs a line."""

from types import SimpleNamespace

import torch
from families import batch, build
from torch import nn
from torch.optim import SGD
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.modeling_outputs import CausalLMOutput

import kdloss
from kdloss import CrossEntropy, Features, Logits, schedules

LOGITS = torch.zeros(2, 3, 5)
LABELS = torch.zeros(2, 3).long()
HEADS = torch.randn(2, 5), torch.randn(2, 4, 5)


class Net(nn.Module):
    """A user's model, with or without blocks."""

    def __init__(self, width=4, classes=3, blocks=0):
        super().__init__()
        self.body, self.act, self.head = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)) if blocks else None
        self.other = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)) if blocks else None

    def forward(self, x):
        return self.head(self.act(self.body(x)))


class Twice(Net):
    def forward(self, x):
        return self.head(self.act(self.act(self.body(x))))


class Pair(nn.Module):
    """A model with two heads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return {"start_logits": self.first(x), "end_logits": self.second(x)}


class Named(Net):
    """A classifier whose first class has this name."""

    def __init__(self, name):
        super().__init__()
        self.config = SimpleNamespace(id2label={0: name, 1: "horse", 2: "cow"})


class Several(Net):
    """A model whose backbone returns a list."""

    def __init__(self):
        super().__init__()
        self.body = nn.Module()
        self.body.forward = lambda x: [x, 2 * x]

    def forward(self, x):
        return self.head(sum(self.body(x)))


class Channels(nn.Module):
    """A net whose features are `[B, C, T]`."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv1d(4, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(-1))


class NoMask(nn.Module):
    """A language model that takes no attention mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def gpt2(depth=2, width=16, seed=0):
    return build("gpt2", width=width, depth=depth, seed=seed)


def step(student, teacher, criterion, **more):
    """Run one step with two language models."""
    return kdloss.Distillation(student, teacher, criterion)(**batch("gpt2"), **more)


def images(student, teacher, criterion, shape=(2, 4)):
    return kdloss.Distillation(student, teacher, criterion)(torch.randn(shape), labels=torch.zeros(2).long())


def projections_not_in_the_optimizer():
    student, criterion = gpt2(), kdloss.FeatureKD("last")
    distill = kdloss.Distiller(gpt2(4, 24), criterion).prepare(student)
    distill(student, **batch("gpt2")).loss.backward()
    SGD(student.parameters(), lr=0.1).step()


def projection_gradients_never_zeroed():
    student, criterion = gpt2(), kdloss.FeatureKD("last")
    distill = kdloss.Distiller(gpt2(4, 24), criterion).prepare(student)
    optimizer = SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    for _ in range(2):
        distill(student, **batch("gpt2")).loss.backward()
        optimizer.step()
        student.zero_grad()


def step_not_counted():
    criterion = kdloss.VanillaKD(alpha=schedules.linear(0.9, 0.1, steps=10))
    model = kdloss.Distillation(gpt2(), gpt2(4), criterion)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**batch("gpt2")).loss.backward()
        optimizer.step()


def load_before_prepare():
    def new_model():
        return kdloss.Distillation(Net(5), Net(7), CrossEntropy() + Features(["body"], pairing="same"))

    new_model().load_state_dict(new_model().prepare(torch.randn(2, 4)).state_dict())


def criterion_replaced():
    model = kdloss.Distillation(Net(), Net(), kdloss.VanillaKD())
    model.criterion = kdloss.VanillaKD()
    model(torch.randn(2, 4))


def second_backward_through_overwritten_logits():
    student = LOGITS[0].clone().requires_grad_()
    loss = kdloss.VanillaKD(overwrite_logits=True)(student, LOGITS[0] + 1, LABELS[0])
    loss.backward(retain_graph=True)
    loss.backward()


def backbone_under_no_grad():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    images(Frozen(), Net(), CrossEntropy() + Features(["body"], pairing="same"))


def feature_changed_in_place():
    class Inner(Net):
        def forward(self, x):
            return self.head(self.body(x).relu_())

    images(Inner(), Net(), CrossEntropy() + Features(["body"], pairing="same"))


def student_is_its_own_teacher():
    student = gpt2()
    step(student, student, kdloss.VanillaKD())


def images_with(**more):
    kdloss.Distillation(Net(), Net(), kdloss.VanillaKD())(torch.randn(2, 4), labels=torch.zeros(2).long(), **more)


def student_with_layer_drop():
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_conv_pos_embedding_groups": 2}
    student = Wav2Vec2ForCTC(Wav2Vec2Config(**shape, **convolutions, vocab_size=9)).train()
    kdloss.Distillation(student, student, 1.0 * Features("all"))(torch.randn(2, 400))


def second_student_of_another_width():
    criterion = CrossEntropy() + Features(["body"], pairing="same")
    for width in (5, 6):
        kdloss.Distiller(Net(7), criterion).prepare(Net(width), torch.randn(2, 4))


def packed_sequence():
    ids = torch.ones(1, 6).long()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    kdloss.Distillation(gpt2(), NoMask(), kdloss.VanillaKD())(input_ids=ids, labels=ids, position_ids=positions)


def packed_sequence_beside_a_mask():
    ids = torch.arange(6)[None]
    packed = {"input_ids": ids, "position_ids": ids % 3, "attention_mask": torch.ones_like(ids)}
    kdloss.Distillation(gpt2(), gpt2(), kdloss.VanillaKD())(**packed, labels=ids)


def stored_rows_beside_padding_on_the_left():
    given = batch("gpt2")
    rows = [{3: -1.0} if real else None for real in given["attention_mask"][1].tolist()]
    stored = kdloss.TopKLogits.from_served([rows, rows], of="logits")
    left = {name: x.flip(1) for name, x in given.items()}
    kdloss.Distillation(gpt2(), None, kdloss.VanillaKD())(**left, teacher=stored)


def model_compiled_as_a_whole():
    student = torch.compile(gpt2(), backend="eager")
    step(student, gpt2(4), kdloss.FeatureKD("last"))


def trainer(folder, teacher=None, criterion=None, arguments=None, student=None, **more):
    from transformers import TrainingArguments

    from kdloss.hf import DistillationTrainer

    plain = {"max_steps": 1, "use_cpu": True, "report_to": "none", "dataloader_pin_memory": False}
    data = [{name: x[0] for name, x in batch("gpt2").items()}] * 2
    return DistillationTrainer(
        student or gpt2(),
        TrainingArguments(folder, **plain | (arguments or {})),
        teacher=teacher or gpt2(4, 24),
        criterion=criterion or kdloss.FeatureKD("last"),
        train_dataset=data,
        **more,
    )


def optimizer_passed_to_the_trainer(folder):
    student = gpt2()
    hf_trainer = trainer(folder, optimizers=(SGD(student.parameters(), lr=0.1), None))
    hf_trainer.create_optimizer()


def resume_without_saved_criterion(folder):
    trainer(folder, criterion=kdloss.VanillaKD(), arguments={"save_steps": 1}).train()
    trainer(folder, arguments={"max_steps": 2}).train(resume_from_checkpoint=True)


def cached(folder, first="a"):
    """Write a cache, and open it with a tokenizer whose first word is `first`."""
    from datasets import Dataset

    import kdloss.cache as cache

    rows = Dataset.from_list([{"id": k, "input_ids": [1, 2, 3]} for k in range(4)])
    written, current = (SimpleNamespace(get_vocab=lambda word=word: {word: 0, "b": 1}) for word in ("a", first))
    cache.write(folder, gpt2(), rows, tokenizer=written, k=4)
    return cache.open(folder, tokenizer=current)


def failing_compiler(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("kdloss.engine.compiled._blocks", {})
    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setenv("KDLOSS_COMPILE", "1")
    student, teacher = torch.randn(2, 8, 17)
    kdloss.VanillaKD(divergence=kdloss.divergences.jsd)(student.requires_grad_(), teacher, torch.zeros(8).long())


def criterion_without_plan(model):
    class Own(nn.Module):
        def forward(self, *args, **settings):
            return torch.zeros(())

    kdloss.Distiller(model, Own())


def trainer_with_another_loss(folder):
    from transformers import Trainer, TrainingArguments

    from kdloss.hf import Distilling

    class Other(Trainer):
        def compute_loss(self, *args, **settings):
            return super().compute_loss(*args, **settings)

    class Both(Distilling, Other):
        pass

    arguments = TrainingArguments(folder, use_cpu=True, report_to="none")
    Both(gpt2(), arguments, teacher=gpt2(4), criterion=kdloss.VanillaKD())


def student_that_ignores_the_count(folder):
    from transformers import GPT2LMHeadModel

    class Ignoring(GPT2LMHeadModel):
        def forward(self, input_ids, labels=None, **_):
            return super().forward(input_ids, labels=labels)

    student, arguments = gpt2(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    student.__class__ = Ignoring
    trainer(folder, criterion=kdloss.VanillaKD(), arguments=arguments, student=student).train()


def extra_missing():
    from kdloss._extras import extra

    with extra("hf", "kdloss.cache"):
        import no_such_package  # noqa: F401


def kd(*args, labels=LABELS, **settings):
    """Call `VanillaKD`: keywords in `names` are settings of the recipe, all others are passed with the logits."""
    names = {"temperature", "alpha", "causal", "reduction", "check_finite"}
    criterion = kdloss.VanillaKD(**{k: v for k, v in settings.items() if k in names})
    return criterion(*args, labels, **{k: v for k, v in settings.items() if k not in names})


HF_OUTPUT = CausalLMOutput(logits=LOGITS)
TOP_IDS, TOP_LOG_PROBS = torch.zeros(2, 3, 2).long() + torch.arange(2), torch.zeros(2, 3, 2)
BODY_FEATURES = CrossEntropy() + Features(["body"], pairing="same")

CASES = {
    "needs …; write: pip install": extra_missing,
    "temperature must be": lambda: kdloss.VanillaKD(temperature=0),
    "two terms are called": lambda: Logits() + Logits(),
    "a criterion is a sum of terms": lambda: kdloss.Distillation(Net(), Net(), lambda s, t: 0),
    "got a criterion as the teacher": lambda: kdloss.Distiller(kdloss.VanillaKD(), Net()),
    "got 2 teachers": lambda: kdloss.Distillation(Net(), [Net(), Net()], kdloss.VanillaKD()),
    "and there is one": lambda: kdloss.Distillation(Net(), Net(), 1.0 * Logits(teacher=1)),
    "needs labels": lambda: kd(LOGITS, LOGITS, labels=None),
    "labels must be int64": lambda: kd(LOGITS, LOGITS, labels=LABELS.int()),
    "soft labels are probabilities": lambda: kd(LOGITS, LOGITS, labels=torch.ones(2, 3, 5)),
    "labels have shape": lambda: kd(LOGITS, LOGITS, labels=LABELS[:, :2]),
    "is out of bounds": lambda: kd(LOGITS, LOGITS, labels=LABELS + 7),
    "outside the": lambda: kd(LOGITS, LOGITS, labels=LABELS + 7, check_finite=True),
    "mask must be": lambda: kd(LOGITS, LOGITS, mask=LABELS),
    "mask has shape": lambda: kd(LOGITS, LOGITS, mask=torch.ones(2, 2).bool()),
    "student is on": lambda: kd(LOGITS, LOGITS.to("meta")),
    "by config.id2label": lambda: images(Named("cat"), Named("dog"), kdloss.VanillaKD()),
    "classes and the teacher … (": lambda: kd(LOGITS, LOGITS[..., :4]),
    "they must stand at the same positions": lambda: kd(LOGITS, LOGITS[:, :2]),
    "have one class, whose probability": lambda: kd(LOGITS[..., :1], LOGITS[..., :1]),
    "nothing tells which axis": lambda: (1.0 * Logits())(torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)),
    "terms on logits share one set": lambda: (CrossEntropy(take=0) + Logits(take=1))(HEADS, HEADS, LABELS[:, 0]),
    "no axis for the classes": lambda: (1.0 * Logits())(LOGITS[0, 0], LOGITS[0, 0]),
    "several heads": lambda: images(Pair(), Pair(), kdloss.VanillaKD()),
    "num_items_in_batch divides": lambda: kd(LOGITS, LOGITS, reduction="sum", num_items_in_batch=3),
    "rows with each other": lambda: kdloss.distances.rkd_angle(torch.zeros(2, 4), torch.zeros(2, 4)),
    "were overwritten": second_backward_through_overwritten_logits,
    "nothing says whether those at t": lambda: kd(HF_OUTPUT, HF_OUTPUT),
    "nothing tells whether its logits at t": lambda: kdloss.Distillation(NoMask(), NoMask(), kdloss.VanillaKD())(
        input_ids=LABELS, labels=LABELS
    ),
    "shifts time": lambda: kd(LOGITS[0], LOGITS[0], labels=LABELS[0], causal=True),
    "takes no attention_mask": lambda: step(gpt2(), NoMask(), kdloss.VanillaKD()),
    "takes no position_ids": packed_sequence,
    "the stored teacher has a row": stored_rows_beside_padding_on_the_left,
    "of a packed row as one": packed_sequence_beside_a_mask,
    "no model reads": lambda: kdloss.Distillation(Net(), Net(), kdloss.VanillaKD())(torch.randn(2, 4), colour=1),
    "no projection between them": lambda: images(Net(5), Net(7), BODY_FEATURES),
    "cannot be chosen before": lambda: kdloss.FeatureKD("last", causal=True)(HF_OUTPUT, HF_OUTPUT, LABELS),
    "does not exist": lambda: kdloss.Distillation(gpt2(), gpt2(4), kdloss.FeatureKD([7])),
    "has no module": lambda: kdloss.Distillation(Net(), Net(), 1.0 * Features(["bodi"], pairing="same")),
    "lists of blocks": lambda: kdloss.Distillation(Net(blocks=3), Net(blocks=3), kdloss.FeatureKD()),
    "has no nn.ModuleList": lambda: kdloss.Distillation(Net(), Net(), kdloss.FeatureKD()),
    "ran more than once": lambda: images(Twice(), Twice(), CrossEntropy() + Features(["act"], pairing="same")),
    "LayerDrop": student_with_layer_drop,
    "several features": lambda: images(Several(), Several(), BODY_FEATURES, (2, 3, 4)),
    "where nothing else is said": lambda: images(Channels(), Channels(), BODY_FEATURES, (2, 4, 5)),
    "and now come": second_student_of_another_width,
    "without gradient although": backbone_under_no_grad,
    "changed in place": feature_changed_in_place,
    "the student is its own teacher": student_is_its_own_teacher,
    "has the outputs of 1 stored teachers": lambda: images_with(teacher=LOGITS),
    "come to …, more than 1": lambda: kd(LOGITS, kdloss.TopKLogits(TOP_IDS, TOP_LOG_PROBS, vocabulary=5), alpha=0.0),
    "begin with None": lambda: kdloss.TopKLogits.from_served([{1: -0.1}], vocabulary=5),
    "has no example": lambda folder: cached(folder)[[9]],
    "another tokenizer": lambda folder: cached(folder, first="c"),
    "the criterion computes the loss": lambda folder: trainer(folder, arguments={"label_smoothing_factor": 0.1}),
    "the optimizer that was given": optimizer_passed_to_the_trainer,
    "has no criterion.safetensors": resume_without_saved_criterion,
    "which this criterion has not built yet": load_before_prepare,
    "was replaced after": criterion_replaced,
    "Task() reads": lambda: kdloss.Task()(LOGITS, labels=LABELS),
    "took a step with": projections_not_in_the_optimizer,
    "gradients of the step before": projection_gradients_never_zeroed,
    "an optimizer stepped": step_not_counted,
    "was compiled as a whole": model_compiled_as_a_whole,
    "is done uncompiled": failing_compiler,
    "makes full logits": lambda: step(gpt2(), gpt2(4), kdloss.Task() + Logits()),
    "measured": lambda: step(gpt2(), gpt2(4), kdloss.VanillaKD()),
    "has no `plan`": lambda: criterion_without_plan(Net()),
    "the criterion replaces the loss of": trainer_with_another_loss,
    "ignores num_items_in_batch": student_that_ignores_the_count,
}
"""The function that triggers each message, by words of its heading."""
