"""Models with several heads, and logits under other names: values and gradients of the formulas."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import kdloss


def kl(student, teacher):
    s, t = student.double().log_softmax(-1), teacher.detach().double().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean()


def assert_same(loss, expected, student):
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-7)
    slopes = [torch.autograd.grad(x, list(student.parameters()), allow_unused=True) for x in (loss, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- question answering: a head for the start of the answer, and a head for its end --


def question_answerer(layers, seed):
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return hf.BertForQuestionAnswering(config).eval()


def questions():
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 6:] = 0
    ids = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([1, 2, 3]), torch.tensor([2, 4, 7])


def test_both_heads_of_a_question_answerer_are_distilled_in_addition_to_its_loss():
    student, teacher, (inputs, start, end) = question_answerer(1, 0), question_answerer(2, 1), questions()
    heads = {head: kdloss.Logits(take=f"{head}_logits", name=head) for head in ("start", "end")}
    criterion = 0.5 * kdloss.Task() + 0.25 * heads["start"] + 0.25 * heads["end"]
    out = kdloss.Distiller(teacher, criterion)(student, **inputs, start_positions=start, end_positions=end)
    s, t = student(**inputs), teacher(**inputs)
    task = (F.cross_entropy(s.start_logits, start) + F.cross_entropy(s.end_logits, end)) / 2
    both = (kl(s.start_logits, t.start_logits) + kl(s.end_logits, t.end_logits)) / 2
    assert_same(out.loss, 0.5 * task + 0.5 * both, student)
    assert sorted(out.components) == ["end", "start", "task"]


@pytest.mark.parametrize("recipe", [kdloss.VanillaKD, kdloss.FeatureKD])
def test_a_recipe_on_several_heads_raises_an_error_with_the_sum_to_write(recipe):
    student, teacher, (inputs, start, end) = question_answerer(1, 0), question_answerer(2, 1), questions()
    distill = kdloss.Distiller(teacher, recipe(1.0) if recipe is kdloss.VanillaKD else recipe("last"))
    with pytest.raises(TypeError, match=r"'start_logits': a Tensor of shape \(3, 8\).* several heads") as error:
        distill(student, **inputs, start_positions=start, end_positions=end)
    line = str(error.value).split("Write ")[1].split(", where")[0]
    out = kdloss.Distiller(teacher, eval(line))(student, **inputs, start_positions=start, end_positions=end)
    assert sorted(out.components) == ["end_logits", "start_logits", "task"]


# -- other outputs --


class Heads(nn.Module):
    """Two heads with five classes each, in the output that `wrap` makes of them."""

    def __init__(self, wrap, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.wrap, self.body = wrap, nn.Linear(4, 8)
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 5)

    def parts(self, x):
        x = self.body(x)
        return self.first(x), self.second(x)

    def forward(self, x):
        return self.wrap(*self.parts(x))


@dataclass
class Output:
    main: Tensor
    helper: Tensor


FORMS = {
    "tuple": (lambda a, b: (a, b), 0, 1),
    "list": (lambda a, b: [a, b], 0, 1),
    "dict": (lambda a, b: {"out": a, "aux": b}, "out", "aux"),
    "dataclass": (Output, "main", "helper"),
    "nested": (lambda a, b: {"heads": (a, b)}, ("heads", 0), ("heads", 1)),
    "function": (lambda a, b: torch.cat([a, b], -1), lambda x: x[:, :5], lambda x: x[:, 5:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_head_learns_from_labels_and_the_other_from_the_teacher(form):
    """As with DeiT's distillation token."""
    wrap, first, second = FORMS[form]
    student, teacher, x, y = Heads(wrap), nn.Linear(4, 5), torch.randn(3, 4), torch.tensor([0, 1, 2])
    criterion = 0.5 * kdloss.CrossEntropy(take=first) + 0.5 * kdloss.Logits(take=second, teacher_take=None)
    out = kdloss.Distiller(teacher, criterion)(student, x, labels=y)
    a, b = student.parts(x)
    assert_same(out.loss, 0.5 * F.cross_entropy(a, y) + 0.5 * kl(b, teacher(x)), student)


@pytest.mark.parametrize("form", FORMS)
def test_the_teachers_output_may_have_another_form(form):
    wrap, _, second = FORMS[form]
    student, teacher, x = nn.Linear(4, 5), Heads(wrap), torch.randn(3, 4)
    out = kdloss.Distiller(teacher, 1.0 * kdloss.Logits(teacher_take=second))(student, x)
    assert_same(out.loss, kl(student(x), teacher.parts(x)[1]), student)


@pytest.mark.parametrize(("form", "name"), [("tuple", "0"), ("dict", "'out'"), ("dataclass", "'main'")])
def test_the_error_for_an_output_without_logits_names_the_take_to_write(form, name):
    student, teacher = Heads(FORMS[form][0]), nn.Linear(4, 5)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(TypeError, match=rf"student's logits .* kdloss\.CrossEntropy\(take={name}\)"):
        kdloss.Distiller(teacher, kdloss.VanillaKD())(student, x, labels=y)
    with pytest.raises(TypeError, match=rf"teacher's logits .* teacher_take={name}"):
        kdloss.Distiller(student, kdloss.VanillaKD())(teacher, x, labels=y)


def towers(seed):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, image = small | {"vocab_size": 40}, small | {"image_size": 8, "patch_size": 4}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=image)).double().eval()
    nn.init.constant_(model.logit_scale, 2.0)
    return model


def test_a_model_of_two_towers_is_distilled_in_both_directions():
    student, teacher = towers(0), towers(1)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 39, (3, 5), generator=generator),
        "attention_mask": torch.ones(3, 5, dtype=torch.long),
        "pixel_values": torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64),
    }
    batch["input_ids"][:, -1], pairs = 39, torch.arange(3)
    names = ("logits_per_image", "logits_per_text")
    with pytest.raises(TypeError, match=r"take='logits_per_image'.*take='logits_per_text'"):
        kdloss.Distiller(teacher, kdloss.VanillaKD())(student, **batch, labels=pairs)
    criterion = sum(
        0.25 * kdloss.CrossEntropy(take=n, name=f"ce_{n}") + 0.25 * kdloss.Logits(take=n, name=n) for n in names
    )
    out = kdloss.Distiller(teacher, criterion)(student, **batch, labels=pairs)
    s, t = student(**batch), teacher(**batch)
    expected = sum(0.25 * F.cross_entropy(s[n], pairs) + 0.25 * kl(s[n], t[n]) for n in names)
    assert_same(out.loss, expected, student)
