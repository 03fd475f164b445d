"""Teachers that change: a moving average, generations, students that teach each other, chains."""

import copy
import weakref
from collections import Counter

import numpy as np
import pytest
import readme
import torch
from families import batch, build
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainingArguments

import kdloss

PAGE = "changing_teachers.md"
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
ALL = torch.ones(6, dtype=torch.bool).numpy()
hugging_face = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3, bias=False, dtype=torch.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1).mean()


def cross_entropy(weight, examples=ALL):
    """Mean cross-entropy of a linear model on some of the examples, and its gradient."""
    x = X.numpy()[examples]
    p, target = softmax(x @ weight.T), np.eye(3)[LABELS.numpy()[examples]]
    return -np.log((p * target).sum(-1)).mean(), (p - target).T @ x / len(x)


def forward_kl(weight, targets, temperature=1.0):
    """T² KL(targets || softmax(x W / T)) of a linear model, and its gradient: T (student - targets) x."""
    x = X.numpy()
    q = softmax(x @ weight.T / temperature)
    return temperature**2 * kl(targets, q), temperature * (q - targets).T @ x / len(x)


def count_runs(*models):
    """Count how often each model runs from now on."""
    runs = Counter()
    for k, model in enumerate(models):
        model.register_forward_hook(lambda *_, k=k: runs.update([k]))
    return runs


# --- a moving average of the student


def test_three_steps_with_a_moving_average_follow_the_formula():
    student, decay, lr, alpha, T = linear(), 0.8, 0.5, 0.3, 2.0
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    model = kdloss.Distillation(student, average, kdloss.VanillaKD(T, alpha))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    weight = student.weight.detach().numpy().copy()
    mean = weight.copy()
    for step in range(3):
        ce, ce_gradient = cross_entropy(weight)
        kd, kd_gradient = forward_kl(weight, softmax(X.numpy() @ mean.T / T), T)
        out = model(X, labels=LABELS)
        out.loss.backward()
        np.testing.assert_allclose(out.loss.item(), alpha * ce + (1 - alpha) * kd, rtol=1e-9)
        gradient = alpha * ce_gradient + (1 - alpha) * kd_gradient
        np.testing.assert_allclose(student.weight.grad.numpy(), gradient, rtol=1e-9, atol=1e-15)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model.student)
        weight = weight - lr * gradient
        mean = weight if step == 0 else decay * mean + (1 - decay) * weight  # torch copies at the first call
        np.testing.assert_allclose(average.module.weight.detach().numpy(), mean, rtol=1e-9)
    assert kd > 0


def test_an_average_is_no_parameter_of_the_module_and_has_no_gradient():
    student = linear()
    average = AveragedModel(student)
    model = kdloss.Distillation(student, average, kdloss.VanillaKD())
    model(X, labels=LABELS).loss.backward()
    assert [id(p) for p in model.parameters()] == [id(student.weight)]
    assert list(model.state_dict()) == ["student.weight"]
    assert average.module.weight.grad is None
    assert average.module.weight.requires_grad
    assert average.training
    assert average.n_averaged == 0


def test_an_average_that_shares_the_students_weights_is_refused():
    student = linear()
    average = AveragedModel(student)
    average.module = student
    with pytest.raises(ValueError, match="runs on weights that the student trains"):
        kdloss.Distillation(student, average, kdloss.VanillaKD())(X, labels=LABELS)


CRITERIA = {
    "gpt2": lambda: kdloss.VanillaKD(),
    "gpt2 features": lambda: kdloss.FeatureKD("auto", logit_weight=1.0),
    "t5": lambda: kdloss.VanillaKD(),
    "vit": lambda: kdloss.FeatureKD("last", logit_weight=1.0),
}


@hugging_face
@pytest.mark.parametrize("case", CRITERIA)
def test_an_average_teaches_like_the_model_inside_it(case):
    """Features, lazy logits and decoder inputs are those of a copy without the wrapper."""
    family = case.split()[0]
    student = build(family, depth=4)
    average = AveragedModel(build(family, depth=4, seed=1))
    gradients, components = [], []
    for teacher in (average, copy.deepcopy(average.module)):
        student.zero_grad()
        model = kdloss.Distillation(student, teacher, CRITERIA[case]()).eval()
        model.train()
        model.student.eval()  # no dropout
        out = model(**batch(family))
        out.loss.backward()
        components.append(out.components)
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert components[0] == components[1]
    assert components[0]["kd"] > 0
    assert len(gradients[0]) > 10
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@hugging_face
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft warns
def test_the_average_of_a_student_with_adapters_is_a_separate_model():
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    student = get_peft_model(build("gpt2", depth=4), LoraConfig(**settings))
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(student)
    model = kdloss.Distillation(student.eval(), average, kdloss.VanillaKD(alpha=0.0))
    model.training = True
    assert model(**batch("gpt2")).loss.item() == pytest.approx(0, abs=1e-6)
    trained = [p for p in student.parameters() if p.requires_grad]
    for p in trained:
        p.data += 0.5
    assert model(**batch("gpt2")).loss.item() > 1e-3
    model(**batch("gpt2")).loss.backward()
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in average.parameters())


def test_batch_norm_statistics_of_an_average_change_only_when_it_is_updated():
    student = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    average = AveragedModel(student)
    model = kdloss.Distillation(student, average, kdloss.VanillaKD())
    model(X, labels=LABELS)
    before = copy.deepcopy(average.state_dict())
    model(X, labels=LABELS)
    assert all(torch.equal(x, before[name]) for name, x in average.state_dict().items())
    average.update_parameters(student)
    assert torch.equal(average.module[1].running_mean, student[1].running_mean)


def test_an_average_behind_a_function_keeps_its_dropout():
    """The teacher of Mean Teacher has dropout, but a model runs in eval mode while it teaches."""
    student = nn.Sequential(nn.Dropout(0.5), linear())
    average = AveragedModel(student)
    seen = []
    average.module[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    for teacher in (average, kdloss.Teacher(lambda *x, **inputs: average(*x, **inputs))):
        kdloss.Distillation(student, teacher, kdloss.VanillaKD())(X, labels=LABELS).loss.backward()
    assert seen == [False, True]
    assert average.module[1].weight.grad is None


@hugging_face
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_average_follows_its_student_in_a_trainer(tmp_path, monkeypatch):
    seen, update = [], AveragedModel.update_parameters

    def recording(average, model):
        seen.append(model.lm_head.weight.detach().double().clone())
        update(average, model)

    monkeypatch.setattr(AveragedModel, "update_parameters", recording)
    small = {"max_steps": 3, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.1, **small)
    data = [{name: x[0] for name, x in batch("gpt2").items()}] * 24
    page = readme.recipe(
        PAGE, "A moving average in a Trainer", arguments=arguments, data=data, student=build("gpt2", depth=4)
    )
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.999 * expected + 0.001 * weight
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[2])
    torch.testing.assert_close(page.average.module.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in page.average.parameters())


# --- students that teach each other


def test_a_step_of_mutual_learning_follows_the_papers_formula_for_both_students():
    first, second = linear(0), linear(1)
    criterion = kdloss.CrossEntropy() + kdloss.Logits()
    runs = count_runs(first, second)
    one, other = first(X), second(X)
    loss = criterion(one, other, LABELS) + criterion(other, one, LABELS)
    loss.backward()
    total = 0.0
    for model, peer in ((first, second), (second, first)):
        weight, targets = model.weight.detach().numpy(), softmax((X @ peer.weight.T).detach().numpy())
        (ce, ce_gradient), (kd, kd_gradient) = cross_entropy(weight), forward_kl(weight, targets)
        np.testing.assert_allclose(model.weight.grad.numpy(), ce_gradient + kd_gradient, rtol=1e-9, atol=1e-15)
        total += ce + kd
    np.testing.assert_allclose(loss.item(), total, rtol=1e-9)
    assert runs == {0: 1, 1: 1}


def test_two_distillers_with_each_others_student_give_the_same_gradients_with_one_more_pass_each():
    first, second = linear(0), linear(1)
    criterion = kdloss.CrossEntropy() + kdloss.Logits()
    one, other = first(X), second(X)
    (criterion(one, other, LABELS) + criterion(other, one, LABELS)).backward()
    expected = [model.weight.grad.clone() for model in (first, second)]
    first.zero_grad()
    second.zero_grad()
    runs = count_runs(first, second)
    taught_by_second, taught_by_first = (
        kdloss.Distiller(teacher, kdloss.CrossEntropy() + kdloss.Logits()) for teacher in (second, first)
    )
    (taught_by_second(first, X, labels=LABELS).loss + taught_by_first(second, X, labels=LABELS).loss).backward()
    assert runs == {0: 2, 1: 2}
    for model, gradient in zip((first, second), expected, strict=True):
        torch.testing.assert_close(model.weight.grad, gradient)
        assert model.training


def test_students_learn_from_their_mixture_which_passes_no_gradient_on():
    students, T = [linear(seed) for seed in range(3)], 3.0
    criterion = kdloss.CrossEntropy() + kdloss.Logits(temperature=T)
    runs = count_runs(*students)
    logits = [student(X) for student in students]
    ensemble = kdloss.Mixture(logits)
    loss = sum(criterion(output, ensemble, LABELS) for output in logits)
    loss.backward()
    weights = [student.weight.detach().numpy() for student in students]
    targets = np.mean([softmax(X.numpy() @ weight.T / T) for weight in weights], axis=0)
    total = 0.0
    for student, weight in zip(students, weights, strict=True):
        (ce, ce_gradient), (kd, kd_gradient) = cross_entropy(weight), forward_kl(weight, targets, T)
        np.testing.assert_allclose(student.weight.grad.numpy(), ce_gradient + kd_gradient, rtol=1e-9, atol=1e-15)
        total += ce + kd
    np.testing.assert_allclose(loss.item(), total, rtol=1e-9)
    assert runs == {0: 1, 1: 1, 2: 1}


# --- chains


def test_a_chain_trains_each_model_with_the_one_before_and_returns_the_result_of_each_stage():
    models = [linear(seed) for seed in range(4)]
    calls = []

    def train(student, teacher):
        calls.append((student, teacher))
        return len(calls)

    assert kdloss.chain(models, train) == [1, 2, 3]
    assert calls == [(models[1], models[0]), (models[2], models[1]), (models[3], models[2])]
    assert kdloss.chain(nn.ModuleList(models[:2]), lambda student, teacher: None) == [None]


def test_two_stages_of_a_chain_follow_the_formula_and_train_no_teacher():
    models, lr = [linear(seed) for seed in range(3)], 0.5
    weights = [model.weight.detach().numpy().copy() for model in models]

    def train(student, teacher):
        model = kdloss.Distillation(student, teacher, kdloss.VanillaKD(1.0, alpha=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr)
        loss = model(X, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = kdloss.chain(models, train)
    for k in (1, 2):
        targets = softmax(X.numpy() @ weights[k - 1].T)
        (ce, ce_gradient), (kd, kd_gradient) = cross_entropy(weights[k]), forward_kl(weights[k], targets)
        np.testing.assert_allclose(losses[k - 1], (ce + kd) / 2, rtol=1e-9)
        weights[k] = weights[k] - lr * (ce_gradient + kd_gradient) / 2
    for model, weight in zip(models, weights, strict=True):
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-9)
    assert models[0].weight.grad is None


def test_an_interrupted_chain_has_trained_the_stages_before():
    models, done = [linear(seed) for seed in range(4)], []

    def train(student, teacher):
        if student is models[2]:
            raise KeyboardInterrupt
        done.append(student)

    with pytest.raises(KeyboardInterrupt):
        kdloss.chain(models, train)
    assert done == [models[1]]


def test_a_chain_of_a_generator_holds_two_models_at_a_time():
    alive = weakref.WeakSet()

    def models():
        for seed in range(4):
            assert len(alive) <= 1
            model = linear(seed)
            alive.add(model)
            yield model
            del model

    def train(student, teacher):
        return len(alive)

    assert kdloss.chain(models(), train) == [2, 2, 2]


def test_chains_without_a_student_or_with_a_model_that_would_teach_itself_are_refused():
    model, trained = linear(), []

    def train(student, teacher):
        trained.append(student)

    with pytest.raises(ValueError, match=r"got none; write \[teacher, student\]"):
        kdloss.chain([], train)
    with pytest.raises(ValueError, match=r"got one Linear; write \[teacher, student\]"):
        kdloss.chain([model], train)
    with pytest.raises(ValueError, match=r"model 2 of the chain is the same as the one before .* not \[model\] \* 3"):
        kdloss.chain([model] * 3, train)
    with pytest.raises(TypeError, match="got one Sequential; write chain"):
        kdloss.chain(nn.Sequential(linear(), linear()), train)
    with pytest.raises(TypeError, match="train is a function of"):
        kdloss.chain(train, [model, linear()])
    assert trained == []


# --- the page


@hugging_face
@pytest.mark.parametrize("title", ["Two students", "Several students"])
def test_recipes_of_the_page_run_each_model_once_per_step(title, monkeypatch):
    runs, steps, forward = Counter(), 2, type(build("gpt2")).forward

    def counted(self, *args, **inputs):
        runs[id(self)] += 1
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(build("gpt2")), "forward", counted)
    student = build("gpt2", depth=4)
    names = {"student": student, "loader": [batch("gpt2")] * steps, "AdamW": torch.optim.AdamW, "nn": nn}
    readme.recipe(PAGE, title, **names)
    assert len(runs) >= 2
    assert set(runs.values()) == {steps}


def test_the_consistency_cost_of_the_mean_teacher_recipe_is_the_papers():
    """The weight is 100 exp(-5 (1 - t)²), the cost a mean over classes and all examples, labelled or not."""
    student = linear(0)
    page = readme.recipe(PAGE, "Mean Teacher", student=student)
    page.average.module.load_state_dict(linear(1).state_dict())
    labels = LABELS.where(torch.arange(6) % 2 == 0, -100)
    for step, ramp in ((0, 100 * np.exp(-5)), (20_000, 100 * np.exp(-1.25)), (50_000, 100)):
        page.criterion.step = step
        student.zero_grad()
        distill = kdloss.Distiller(page.noisy, page.criterion)
        loss = distill(student, X, labels=labels).loss
        loss.backward()
        x = X.numpy()
        ce, gradient = cross_entropy(student.weight.detach().numpy(), labels.numpy() >= 0)
        p, q = (softmax(x @ model.weight.detach().numpy().T) for model in (student, page.average.module))
        np.testing.assert_allclose(loss.item(), ce + ramp * np.mean((p - q) ** 2), rtol=1e-9)
        over_six = distill(student, X, labels=labels, num_items_in_batch=6).loss
        np.testing.assert_allclose(over_six.item(), ce / 2 + ramp * np.mean((p - q) ** 2), rtol=1e-9)
        slope = 2 * (p - q) / p.size  # by p; the next line goes through the softmax
        gradient = gradient + ramp * (p * (slope - (slope * p).sum(-1, keepdims=True))).T @ x
        np.testing.assert_allclose(student.weight.grad.numpy(), gradient, rtol=1e-8, atol=1e-14)
