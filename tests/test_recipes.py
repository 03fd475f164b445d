"""Losses of papers, each as a sum and a training step of at most eight lines, compared with its formula in float64."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES, ResNet, build
from readme import recipe as from_docs
from stepping import Steps, asked, holds_to, kl, recipe, texts, user_lines
from torch import nn
from torch.optim import SGD

from kdloss import CrossEntropy, Distillation, Features, Logits, Task, distances, divergences
from kdloss.distances import attention_mse

page = partial(from_docs, "recipes_images.md")
pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def test_user_lines_leaves_out_comments_and_blank_lines():
    def short(x):
        """Words."""
        y = x + 1

        # a remark
        return [
            y,
        ]

    assert len(user_lines(short)) == 5
    with pytest.raises(AssertionError, match="takes 9 lines"):

        @recipe
        def long(x):
            x += 1
            x += 1
            x += 1
            x += 1
            x += 1
            x += 1
            x += 1
            x += 1
            return x


# -- DistilBERT: the weights and T of its authors' training command, `--alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0` --


@recipe
def distilbert(student, teacher, batch):
    kd = Logits(temperature=2.0, positions="mask")
    cos = Features("last", distance=distances.cosine, positions="mask", name="cos")
    model = Distillation(student, teacher, 2.0 * CrossEntropy(name="mlm") + 5.0 * kd + cos)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


def test_distilbert_learns_masked_tokens_from_labels_and_all_tokens_from_the_teacher():
    student = build("distilbert", depth=2).double()
    teacher, batch = build("bert", depth=4, seed=1).double(), texts()
    with Steps() as steps:
        distilbert(student, teacher, batch)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        s, t = asked(before.student, batch), asked(teacher, batch)
        token, labelled = batch["attention_mask"].bool(), batch["labels"] != -100
        assert 0 < labelled.sum() < token.sum()
        mlm = F.cross_entropy(s.logits[labelled], batch["labels"][labelled])
        cos = 1 - F.cosine_similarity(s.hidden_states[-1], t.hidden_states[-1].detach(), -1)[token].mean()
        return 2 * mlm + 5 * kl(s.logits, t.logits.detach(), 2.0)[token].mean() + cos

    holds_to(steps, loss)
    assert list(steps.outs[0].components) == ["mlm", "kd", "cos/1-3", "cos"]


# -- TinyBERT: embedding, hidden states and attention scores, summed over layers, and soft labels at T = 1 --


@recipe
def tinybert(student, teacher, batch):
    qk = [tuple(f"bert.encoder.layer.{i}.attention.self.{x}" for x in ("query", "key")) for i in range(4)]
    emb = Features(["bert.embeddings"], pairing="same", name="emb")
    hidden = Features(pairing=[(0, 1), (1, 3)], name="hidden")
    attn = Features(pairing=[(qk[0], qk[1]), (qk[1], qk[3])], distance=partial(attention_mse, heads=2), name="attn")
    model = Distillation(student, teacher, emb + 2 * hidden + 2 * attn + Logits()).prepare(**batch).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


def classifier(width, depth, seed, **more):
    """A BERT text classifier without dropout."""
    torch.manual_seed(seed)
    config = FAMILIES["bert"][0](width, depth)
    config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3, **more})
    return hf.BertForSequenceClassification(config).double()


def attention_scores(model, hidden, block):
    """Scaled products of queries and keys of a block with two heads, computed from its input."""
    attention = model.bert.encoder.layer[block].attention.self
    q, k = (linear(hidden).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (attention.query, attention.key))
    return q @ k.mT / q.shape[-1] ** 0.5


def test_tinybert_learns_embedding_hidden_states_attention_and_soft_labels_in_one_pass():
    student, teacher = classifier(16, 2, seed=0, num_labels=3), classifier(24, 4, seed=1, num_labels=3)
    batch = {name: x for name, x in texts().items() if name != "labels"}
    with Steps() as steps:
        tinybert(student, teacher, batch)
    assert steps.ran[teacher] == steps.ran[student] == 2, "one to measure widths, one to train"
    lengths = batch["attention_mask"].sum(1).tolist()

    def mean_over_texts(values):
        """The mean over the tokens of each text, then over the texts."""
        return sum(x[:n].mean() for x, n in zip(values, lengths, strict=True)) / len(lengths)

    def loss(before):
        s, t = asked(before.student, batch), asked(teacher, batch)
        project = before.criterion.terms["hidden"].projections
        embedding = before.criterion.terms["emb"].projections["bert/embeddings"]
        total = mean_over_texts((embedding(s.hidden_states[0]) - t.hidden_states[0].detach()).square().mean(-1))
        for i, j in ((0, 1), (1, 3)):
            gap = project[str(i)](s.hidden_states[i + 1]) - t.hidden_states[j + 1].detach()
            total = total + mean_over_texts(gap.square().mean(-1))
            scores = attention_scores(before.student, s.hidden_states[i], i)
            gap = scores - attention_scores(teacher, t.hidden_states[j], j).detach()
            total = total + sum(g[:, :n, :n].square().mean() for g, n in zip(gap, lengths, strict=True)) / 2
        return total + kl(s.logits, t.logits.detach(), 1.0).mean()

    holds_to(steps, loss)


# -- DeiT, as in docs/recipes_images.md: one head learns labels, the other the teacher's decisions --


@recipe
def deit(student, teacher, images, labels):
    model = Distillation(student, teacher, page("DeiT").criterion)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images, labels=labels).loss.backward()
    optimizer.step()


@dataclass
class Heads:
    cls_logits: torch.Tensor
    distillation_logits: torch.Tensor


class TwoHeads(nn.Module):
    """A convolution and two heads, in an output of this kind."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = nn.Conv2d(3, 6, 4), kind
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        x = torch.tanh(self.body(x)).mean((2, 3))
        return self.kind(cls_logits=self.first(x), distillation_logits=self.second(x))


def hugging_faces_deit():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**sizes, image_size=16, patch_size=8, num_labels=5, initializer_range=0.3)
    )


@pytest.mark.parametrize(
    "student", [hugging_faces_deit, partial(TwoHeads, dict), partial(TwoHeads, Heads)], ids=["hf", "dict", "dataclass"]
)
def test_deit_learns_labels_in_one_head_and_the_teachers_decisions_in_the_other(student):
    student, teacher = student().double(), ResNet().double()
    images, labels = torch.randn(6, 3, 16, 16).double(), torch.tensor([0, 4, -100, 2, 1, 3])
    teacher.fc.bias.data -= teacher.eval()(images).mean(0).detach()  # so that its decisions differ between images
    with Steps() as steps:
        deit(student, teacher, images, labels)
    assert steps.ran[student] == steps.ran[teacher] == 1
    decided = teacher.eval()(images).argmax(-1)
    assert len(set(decided.tolist())) > 1

    def loss(before):
        out = before.student(images)
        get = out.get if isinstance(out, dict) else partial(getattr, out)
        counted = labels != -100
        hard = F.cross_entropy(get("cls_logits")[counted], labels[counted], label_smoothing=0.1)
        return 0.5 * hard + 0.5 * F.cross_entropy(get("distillation_logits")[counted], decided[counted])

    holds_to(steps, loss)


# -- CRD + KD, as in docs/recipes_images.md --


@recipe
def crd(student, teacher, images, labels):
    model = Distillation(student, teacher, page("CRD").criterion).prepare(images).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(images, labels=labels).loss.backward()
    optimizer.step()


class Pooled(nn.Module):
    """A CNN whose pooled features are the output of a module."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3), nn.Linear(width, 5)
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.fc(self.avgpool(torch.relu(self.conv(x))))


def test_crd_with_kd_trains_both_heads_of_crd():
    student, teacher = Pooled(6).double(), Pooled(9).double()
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 4, 1, 2, 1, 3])
    with Steps() as steps:
        crd(student, teacher, images, labels)
    assert steps.ran[student] == steps.ran[teacher] == 2, "one to measure widths, one to train"

    def loss(before):
        features = [m.avgpool(torch.relu(m.conv(images))) for m in (before.student, teacher)]
        logits = [m.fc(x) for m, x in zip((before.student, teacher), features, strict=True)]
        heads = before.criterion.terms["crd"].distances["avgpool"]
        s, t = (F.normalize(g(x), dim=-1) for g, x in zip((heads.student, heads.teacher), features, strict=True))
        noise = 16384 * math.exp(1 / (2 * 128 * 0.07**2))  # N z, the mean of exp(cosine / tau)

        def positive(products):
            """The probability that a pair is positive."""
            return 1 / (1 + noise * (-products / 0.07).exp())

        contrast = -2 * positive((s * t).sum(-1)).log()
        for anchor, others in ((s, heads.teachers), (t, heads.students)):
            contrast = contrast - (1 - positive(anchor @ others.clone().T)).log().sum(-1)
        ce_and_kd = F.cross_entropy(logits[0], labels) + kl(logits[0], logits[1].detach(), 4.0).mean()
        return ce_and_kd + 0.8 * contrast.mean()

    holds_to(steps, loss)
    heads = steps.model.criterion.terms["crd"].distances["avgpool"]
    assert heads.student.weight.grad.any()
    assert heads.teacher.weight.grad.any()
    assert heads.next == 6, "this batch is remembered, that which measured widths isn't"


# -- Regression: a custom loss, and the teacher's value --


def squared(output, score):
    return (output.logits.squeeze(-1) - score).square()


@recipe
def regression(student, teacher, batch):
    model = Distillation(student, teacher, 0.4 * Task(squared) + 0.6 * Logits(divergences.logit_mse))
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


def test_regression_learns_the_label_and_the_teachers_value_of_each_text():
    student, teacher = classifier(16, 2, seed=0, num_labels=1), classifier(24, 3, seed=1, num_labels=1)
    batch = {**texts(), "labels": torch.tensor([0.25, 4.5]).double()}
    with Steps() as steps:
        regression(student, teacher, batch)
    assert steps.ran[student] == steps.ran[teacher] == 1

    def loss(before):
        s, t = (asked(m, batch).logits[:, 0] for m in (before.student, teacher))
        return 0.4 * F.mse_loss(s, batch["labels"]) + 0.6 * F.mse_loss(s, t.detach())

    holds_to(steps, loss)
    assert sorted(steps.outs[0].components) == ["kd", "task"]


# -- Two teachers: the features of each, and their average predictions --


@recipe
def two_teachers(student, teachers, batch, average):
    criterion = 0.3 * CrossEntropy() + 0.7 * Logits(temperature=2.0, teacher=[0, 1], average=average)
    criterion += 0.5 * Features("last", teacher=0, name="first") + Features("all", teacher=1, name="second")
    model = Distillation(student, teachers, criterion).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_two_teachers_of_different_sizes_each_give_features_and_together_give_logits(average):
    student = build("llama", width=16, depth=2).double()
    teachers = [build("llama", 24, 4, seed=1).double(), build("llama", 32, 3, seed=2).double()]
    batch = texts(labelled=0.8)
    with Steps() as steps:
        two_teachers(student, teachers, batch, average)
    assert [steps.ran[m] for m in (student, *teachers)] == [1, 1, 1]

    def blocks(model):
        """The output of each block, because Hugging Face's last hidden state has passed the final norm."""
        outputs, layers = [], model.model.layers
        handles = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in layers]
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for handle in handles:
            handle.remove()
        return outputs, logits

    def loss(before):
        counted = (batch["labels"][:, 1:] != -100) & batch["attention_mask"][:, 1:].bool()
        ours, logits = blocks(before.student)
        (first, first_logits), (second, second_logits) = map(blocks, teachers)
        if average == "logits":
            target = (first_logits + second_logits) / 2
        else:
            target = 2 * ((first_logits / 2).softmax(-1) / 2 + (second_logits / 2).softmax(-1) / 2).log()
        project = {name: before.criterion.terms[name].projections for name in ("first", "second")}

        def gap(name, i, features):
            return (project[name][str(i)](ours[i]) - features.detach()).square().mean(-1)[:, :-1][counted].mean()

        ce = F.cross_entropy(logits[:, :-1][counted], batch["labels"][:, 1:][counted])
        kd = kl(logits, target.detach(), 2.0)[:, :-1][counted].mean()
        features = 0.5 * gap("first", 1, first[3]) + (gap("second", 0, second[0]) + gap("second", 1, second[2])) / 2
        return 0.3 * ce + 0.7 * kd + features

    holds_to(steps, loss)
