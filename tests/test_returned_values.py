"""What models, losses and users hand over in another form than expected is used as meant, or refused with a remedy."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdloss
from kdloss import CrossEntropy, Distillation, Features, Logits, Task, VanillaKD, distances, divergences
from kdloss.terms import Term

X, Y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


class Net(nn.Module):
    """A CNN without a list of blocks."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


class WithAuxiliary(Net):
    """A net that returns a second output in training."""

    def forward(self, x):
        return (super().forward(x), super().forward(-x)) if self.training else super().forward(x)


class Own(Term):
    """A term whose loss is a function of the step."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def loss(self, step):
        return self.function(step)


def body(distance=distances.mse, **options):
    return 1.0 * Features(["body"], pairing="same", distance=distance, **options)


def gradients(loss, model):
    return torch.autograd.grad(loss, [*model.parameters()])


def assert_same(ours, expected, model, **tolerance):
    torch.testing.assert_close(ours.detach(), expected.detach(), **tolerance)
    torch.testing.assert_close(gradients(ours, model), gradients(expected, model), **tolerance)


# -- losses that are no tensor of one value per position ------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(None, "None"), (0.5, r"0\.5"), ((1, 2), "a tuple")])
@pytest.mark.parametrize("kind", ["task", "term", "divergence", "distance"])
def test_the_error_for_a_loss_that_is_no_tensor_names_it_and_what_it_returned(kind, value, word):
    criterion, whose = {
        "task": (1.0 * Task(lambda output, labels: value), r"the term 'task', Task\(<lambda>\)"),
        "term": (1.0 * Own(lambda step: value, name="mine"), r"the term 'mine', Own\(\)"),
        "divergence": (1.0 * Logits(lambda s, t, temperature: value), "the divergence <lambda>"),
        "distance": (body(lambda s, t: value), "feature/body-body: the distance <lambda>"),
    }[kind]
    model = Distillation(Net(), None if kind in ("task", "term") else Net(), criterion)
    if kind in ("task", "term"):
        model = Distillation(Net(), [], criterion)
    with pytest.raises(TypeError, match=rf"{whose},? returned {word}; a loss is a tensor.*`return loss`.*\.item\(\)"):
        model(X, labels=Y)


def test_the_error_for_a_reported_number_says_that_a_term_reports_tensors():
    def loss(step):
        step.report("term/part", 0.5)
        return step.student_logits().mean(-1)

    with pytest.raises(TypeError, match=r"reports tensors.*got 0\.5"):
        Own(loss)(torch.randn(6, 5))


def test_the_error_for_a_distance_that_returns_one_number_gives_a_line_that_is_right():
    with pytest.raises(ValueError, match=r"body: a distance returns one value per position, \(6, 4\).*mse_loss") as e:
        Distillation(Net(), Net(), body(F.mse_loss))(X)
    assert "returned ()" in str(e.value)
    line = re.search(r"distance=(lambda .*\.mean\(-1\))", str(e.value))[1]
    student, teacher = Net().double(), Net().double()
    loss = Distillation(student, teacher, body(eval(line)))(X.double()).loss
    s, t = (net.body(net.stem(X.double()).relu()) for net in (student, teacher))
    expected = F.mse_loss(s, t.detach())
    torch.testing.assert_close(loss, expected)
    wanted = [*student.stem.parameters(), *student.body.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("project", ["student", "teacher"])
def test_the_error_for_a_projection_of_another_width_says_which_width_it_gave(project):
    term = body(projection=lambda width, wanted: nn.Linear(width, 7), project=project)
    model = Distillation(Net(4), Net(6), term).prepare(X)
    widths = "have width 7 and the teacher's 6" if project == "student" else "have width 4 and the teacher's 7"
    with pytest.raises(ValueError, match=f"after the projection Linear the student's features {widths}") as error:
        model(X)
    assert "no projection" not in str(error.value)


# -- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [divergences.dkd, divergences.nkd, lambda s, t, labels, temperature: s.sum(-1)])
def test_the_error_for_soft_labels_of_a_divergence_that_reads_classes_gives_the_reason(divergence):
    with pytest.raises(ValueError, match=r"'kd' compares by the class.*\(6, 5\).*no single class.*forward_kl") as error:
        VanillaKD(divergence=divergence)(torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5).softmax(-1))
    assert "there are none" not in str(error.value)


@pytest.mark.parametrize("output", ["tensor", "object"])
def test_the_lines_of_the_error_for_labels_that_are_no_classes_run_for_tensors_and_for_objects(output):
    with pytest.raises(TypeError) as error:
        VanillaKD()(torch.randn(8, 1), torch.randn(8, 1), torch.rand(8))
    lines = re.findall(r"write (kdloss\.Task\(.*?\) \+ kdloss\.Logits\([\w.]+\))", str(error.value))
    if output == "object":
        assert "output.logits in place of output" in str(error.value)
        lines = [re.sub(r"\boutput\b(?!,? ?labels:)", "output.logits", x) for x in lines]
    regress, yes_or_no = (eval(x, {"kdloss": kdloss, "torch": torch}) for x in lines)
    for classes, criterion in ((1, regress), (1, yes_or_no), (5, yes_or_no)):
        s = torch.randn(8, classes, dtype=torch.float64, requires_grad=True)
        t, y = torch.randn(8, classes).double(), torch.randint(2, (8, classes))
        p, q = t.sigmoid(), s.sigmoid()
        if criterion is regress:
            expected, y = (s - y).square().mean() + (s - t).square().mean(), y.squeeze(-1)
        else:
            own = -(y * q.log() + (1 - y) * (1 - q).log()).sum(-1)
            expected = (own + (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)).mean()
        given = (s, t) if output == "tensor" else (SimpleNamespace(logits=s), SimpleNamespace(logits=t))
        loss = criterion(*given, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s))


# -- models that return other things in training than in eval mode -----------------------------------------


@pytest.mark.parametrize("term", [CrossEntropy(take=0) + Logits(take=0), Task(F.cross_entropy, take=0) + Logits()])
def test_the_error_for_an_index_into_a_tensor_gives_a_take_that_works_in_both_modes(term):
    model = Distillation(WithAuxiliary(), WithAuxiliary(), term).eval()
    with pytest.raises(TypeError, match=r"take=0 finds no.*take is a function: take=lambda") as error:
        model(X, labels=Y)
    take = eval(re.search(r"take=(lambda .*)", str(error.value))[1])
    student, teacher = WithAuxiliary().double(), WithAuxiliary().double()
    model = Distillation(student, teacher, CrossEntropy(take=take) + Logits(take=take), teacher_in_eval=True)
    x = X.double()
    for training in (True, False):
        model.train(training)
        out = model(x, labels=Y)
        z, t = Net.forward(student, x), Net.forward(teacher, x).detach()
        kl = (t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()
        assert_same(out.loss, F.cross_entropy(z, Y) + kl, student)


# -- masks and indices that are no tensors ------------------------------------------------------------------


@pytest.mark.parametrize("given", [[True] * 6, {"feature": [True] * 6}, {"feature": "all"}])
@pytest.mark.parametrize("features", [True, False])
def test_a_feature_mask_that_is_no_tensor_is_refused(given, features):
    criterion = (0.5 * CrossEntropy() + body() if features else 0.5 * CrossEntropy()) + Logits()
    if not features and "feature" in given:
        given = {"kd": [True]}
    with pytest.raises(TypeError, match=r"feature_mask is a boolean tensor.*got a (list|str); write torch\.tensor"):
        Distillation(Net(), Net(), criterion)(X, labels=Y, feature_mask=given)


def test_an_index_that_is_no_tensor_is_refused():
    distance = lambda student, teacher, index: (student - teacher).square().mean(-1)  # noqa: E731
    with pytest.raises(TypeError, match=r"index is an integer tensor.*list"):
        Distillation(Net(), Net(), body(distance))(X, index=[0, 1, 2, 3, 4, 5])


# -- temperatures ---------------------------------------------------------------------------------------------


class Warming(nn.Module):
    def forward(self, step):
        return 2.0 + step


@pytest.mark.parametrize("value", [nn.Parameter(torch.tensor(2.0)), Warming()])
def test_a_temperature_that_is_a_parameter_or_a_module_is_refused_and_the_old_one_stays(value):
    with pytest.raises(TypeError, match=r"temperature (must be|is) a number"):
        Logits(temperature=value)
    for holder in (Logits(temperature=3.0), VanillaKD(3.0)):
        with pytest.raises(TypeError, match=r"temperature (must be|is) a number"):
            holder.temperature = value
        assert holder.temperature == 3.0
        assert not [*holder.parameters()]
        assert value not in [*holder.modules()]
        holder.temperature = value.forward if isinstance(value, nn.Module) else value.item()
        term = holder if isinstance(holder, Logits) else holder.terms["kd"]
        s, t = torch.randn(6, 5), torch.randn(6, 5)
        p, q = (t / 2).log_softmax(-1), (s / 2).log_softmax(-1)
        torch.testing.assert_close(term(s, t), 4 * F.kl_div(q, p, reduction="batchmean", log_target=True))


def test_a_module_as_alpha_is_refused_and_the_old_one_stays():
    criterion = VanillaKD(alpha=0.25)
    with pytest.raises(TypeError, match="a weight is a number"):
        criterion.alpha = Warming()
    assert criterion.alpha == 0.25
    assert sum(isinstance(m, Warming) for m in criterion.modules()) == 0


# -- inference mode -------------------------------------------------------------------------------------------


class Inferred(Net):
    """A teacher that runs in inference mode by itself."""

    def forward(self, x):
        with torch.inference_mode():
            return super().forward(x)


CRITERIA = {
    "kl": lambda: VanillaKD(2.0, 0.5),
    "autograd": lambda: Logits(lambda s, t, temperature: (s * t).sum(-1) / temperature),
    "whole batch": lambda: Logits(divergences.dist),
    "own term": lambda: Own(lambda step: (step.student_logits() * step.teacher_logits()).sum(-1), teacher=0),
    "features": lambda: body(distances.cosine) + VanillaKD(),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_teacher_that_runs_in_inference_mode_teaches_as_one_that_does_not(name):
    student, teacher, plain = Net(), Inferred(), Net()
    plain.load_state_dict(teacher.state_dict())
    ours, expected = (Distillation(student, t, CRITERIA[name]())(X, labels=Y).loss for t in (teacher, plain))
    torch.testing.assert_close(ours, expected)
    found = [torch.autograd.grad(x, [*student.parameters()], allow_unused=True) for x in (ours, expected)]
    torch.testing.assert_close(*([g for g in gs if g is not None] for gs in found))


def test_stored_logits_of_any_kind_made_in_inference_mode_teach_as_others_do():
    z = torch.randn(6, 5, requires_grad=True)
    t, h, w = torch.randn(6, 5), torch.randn(6, 3), torch.randn(5, 3)
    kinds = {
        "tensor": lambda: t.clone(),
        "top-k": lambda: kdloss.TopKLogits.of(t.clone(), 3),
        "lazy": lambda: kdloss.LazyLogits(h.clone(), w.clone()),
        "two": lambda: [t.clone(), 2 * t],
    }
    for name, make in kinds.items():
        criterion = kdloss.MultiTeacherKD() if name == "two" else VanillaKD()
        with torch.inference_mode():
            inferred = make()
        for _ in range(2):  # the second step goes the short way
            (ours,), (expected,) = (torch.autograd.grad(criterion(z, t, Y), z) for t in (inferred, make()))
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("distance", [distances.mse, distances.VID])
def test_projections_prepared_in_inference_mode_are_trained(distance):
    model = Distillation(Net(4), Net(6), CrossEntropy() + body(distance))
    with torch.inference_mode():
        model.prepare(X)
    trained = [*model.criterion.parameters()]
    assert trained
    optimizer, before = torch.optim.SGD(trained, 0.1), [p.detach().clone() for p in trained]
    model(X, labels=Y).loss.backward()
    optimizer.step()
    assert all((p != old).any() for p, old in zip(trained, before, strict=True))


# -- a teacher of another dtype -------------------------------------------------------------------------------


def test_a_teacher_in_bf16_reads_images_through_its_inputs_as_the_page_says():
    student, teacher = Net(), Net(6).bfloat16()
    with torch.no_grad():
        t = teacher(X.bfloat16()).float()
    by_position = kdloss.Teacher(teacher, inputs=lambda x: x.bfloat16())
    by_name = kdloss.Teacher(teacher, inputs=lambda batch: batch | {"x": batch["x"].bfloat16()})
    for given, args, inputs in ((by_position, (X,), {}), (by_name, (), {"x": X})):
        loss = Distillation(student, given, 1.0 * Logits())(*args, **inputs).loss
        assert_same(loss, (t.softmax(-1) * (t.log_softmax(-1) - student(X).log_softmax(-1))).sum(-1).mean(), student)
