"""The base model under a student's adapters as its teacher, and students that are their own teachers."""

import copy
import pickle

import pytest
import torch
from families import batch, build
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import log_softmax

import kdloss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*loss_type=None.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # raised inside peft
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
]
LORA = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "trained head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "lora on the head": LoraConfig(**LORA | {"target_modules": ["c_attn", "lm_head"]}),
    "trained tokens": LoraConfig(**LORA, trainable_token_indices=[3, 4]),
    "ia3": IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True,
        init_ia3_weights=False,
    ),
}  # fmt: skip


def base_and_adapted(config, seed=0):
    """Return a base model, and a copy with adapters that change its outputs."""
    plain = build("gpt2", depth=4, seed=seed).eval()
    torch.manual_seed(3)
    student = get_peft_model(copy.deepcopy(plain), copy.deepcopy(config))
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.5 * torch.randn_like(p)
    return plain, student


def state(model):
    return (
        {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        {
            n: (m.training, getattr(m, "_disable_adapters", None), "forward" in vars(m))
            for n, m in model.named_modules()
        },
        getattr(model, "active_adapter", None),
    )


def assert_unchanged(before, after):
    assert all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    assert before[1:] == after[1:]


def kl(student, teacher):
    s, t = (log_softmax(z[:, :-1].double(), -1) for z in (student, teacher))
    return (t.exp() * (t - s)).sum(-1).mean().item()


def ids():
    return {"input_ids": batch("gpt2")["input_ids"]}


@pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True")  # raised by peft with transformers 4
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("criterion", [kdloss.VanillaKD(alpha=0.0), kdloss.FeatureKD("all", alpha=0.0)], ids=repr)
def test_the_base_under_adapters_gives_the_loss_and_gradients_of_a_base_loaded_separately(config, criterion):
    plain, student = base_and_adapted(config)
    student.eval()  # no dropout, so that both teachers see the same student
    results = []
    for teacher in (plain, kdloss.base_of(student)):
        before = state(student)
        loss = kdloss.Distiller(teacher, copy.deepcopy(criterion))(student, **batch("gpt2")).loss
        assert_unchanged(before, state(student))
        trained = [p for p in student.parameters() if p.requires_grad]
        results.append((loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)))
    assert results[0][0] > 1e-5
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-7)


def test_the_base_stays_the_same_teacher_while_its_student_trains():
    plain, student = base_and_adapted(CONFIGS["trained head"])
    model = kdloss.Distillation(student, kdloss.base_of(student), kdloss.VanillaKD(1.0, 0.0)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with torch.no_grad():
        expected = plain(**ids()).logits
    losses = []
    for _ in range(5):
        before = [m.training for m in student.modules()]
        out = model(**ids())
        assert [m.training for m in student.modules()] == before
        assert out.loss.item() == pytest.approx(kl(out.logits.detach(), expected), rel=1e-4)
        losses.append(out.loss.item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert not any("teacher" in name or name.split(".")[0] == "module" for name in model.state_dict())


@pytest.mark.parametrize("where", ["the base", "get_base_model", "the student", "a method", "a wrapper"])
def test_a_student_with_adapters_that_is_its_own_teacher_is_refused(where):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    base = build("gpt2")
    student = get_peft_model(base, copy.deepcopy(CONFIGS["lora"]))
    teacher = {
        "the base": base,
        "get_base_model": student.get_base_model(),
        "the student": student,
        "a method": student.forward,
        "a wrapper": Wrapper(base),
    }[where]
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0))
    for _ in range(2):  # the error is raised at every step
        with pytest.raises(ValueError, match=r"teacher 0 .*lora_A.*kdloss\.base_of\(student\)"):
            distill(student, **batch("gpt2"))
    with pytest.raises(ValueError, match=r"kdloss\.base_of"):
        kdloss.Distiller([build("gpt2", seed=2), teacher], kdloss.MultiTeacherKD(alpha=0.0))(student, **batch("gpt2"))
    kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 1.0))(student, **batch("gpt2"))  # no term reads the teacher


def test_weights_shared_by_teacher_and_student_are_refused_if_they_are_trained_and_used():
    trunk = nn.Linear(4, 8)
    student, teacher = nn.Sequential(trunk, nn.Linear(8, 3)), nn.Sequential(trunk, nn.Linear(8, 3))
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0))
    with pytest.raises(ValueError, match=r"'0\.weight'.*copy\.deepcopy\(student\).*kdloss\.Teacher\(lambda"):
        distill(student, torch.ones(2, 4))
    with pytest.raises(ValueError, match="the student is its own teacher"):
        kdloss.Distiller(student, kdloss.VanillaKD(1.0, 0.0))(student, torch.ones(2, 4))
    trunk.requires_grad_(False)
    distill(student, torch.ones(2, 4)).loss.backward()
    trunk.requires_grad_(True)
    itself = kdloss.Teacher(lambda x: student(x))
    assert kdloss.Distiller(itself, kdloss.VanillaKD(1.0, 0.0))(student, torch.ones(2, 4)).loss.item() == 0


def test_shared_weights_that_the_teacher_does_not_use_are_allowed():
    class Without(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            with self.model.disable_adapter():
                return self.model(**inputs)

    plain, student = base_and_adapted(CONFIGS["trained head"])
    student.eval()
    loss = kdloss.Distiller(Without(student), kdloss.VanillaKD(1.0, 0.0))(student, **ids()).loss
    with torch.no_grad():
        assert loss.item() == pytest.approx(kl(student(**ids()).logits, plain(**ids()).logits), rel=1e-4)


def test_the_student_is_unchanged_after_a_call_and_after_an_exception():
    _, student = base_and_adapted(CONFIGS["lora"])
    student.train()
    frozen = next(p for n, p in student.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)  # peft would turn it on again
    student.base_model.model.transformer.h[1].eval()
    before, teacher = state(student), kdloss.base_of(student)
    teacher(**ids())
    assert_unchanged(before, state(student))
    with pytest.raises(IndexError):
        teacher(input_ids=torch.tensor([[9999]]))
    assert_unchanged(before, state(student))
    with kdloss.capture(teacher, [1], stop=True) as seen:
        teacher(**ids())
    assert_unchanged(before, state(student))
    assert not seen[1].requires_grad


def test_the_base_runs_without_any_of_several_adapters_and_without_prompts():
    plain, student = base_and_adapted(CONFIGS["lora"])
    student.add_adapter("second", LoraConfig(**LORA, r=3))
    student.set_adapter("second")
    student.eval()
    torch.testing.assert_close(kdloss.base_of(student)(**ids()).logits, plain(**ids()).logits)
    assert student.active_adapter == "second"
    prompted = get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    expected, before = plain(**ids()).logits, state(prompted)
    torch.testing.assert_close(kdloss.base_of(prompted)(**ids()).logits, expected.detach())
    assert_unchanged(before, state(prompted))


def test_the_base_runs_without_adapters_added_by_transformers():
    model = build("gpt2").eval()
    expected = model(**ids()).logits.detach()
    model.add_adapter(copy.deepcopy(CONFIGS["lora"]))
    model.eval()
    before = state(model)
    assert not torch.allclose(model(**ids()).logits, expected)
    torch.testing.assert_close(kdloss.base_of(model)(**ids()).logits, expected)
    assert_unchanged(before, state(model))
    with pytest.raises(ValueError, match=r"kdloss\.base_of"):
        kdloss.Distiller(model, kdloss.VanillaKD())(model, **batch("gpt2"))


def test_models_whose_base_is_missing_or_changed_are_refused():
    _, student = base_and_adapted(CONFIGS["lora"])
    teacher = kdloss.base_of(student)
    student.merge_adapter()
    for merged in (lambda: kdloss.base_of(student), lambda: teacher(**ids())):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            merged()
    student.unmerge_adapter()
    teacher(**ids())
    for change, match in (
        ({"bias": "lora_only"}, "biases are trained"),
        ({"init_lora_weights": "pissa"}, "pissa.*Load the base a second time"),
        ({"init_lora_weights": "olora"}, "olora"),
    ):
        _, other = base_and_adapted(LoraConfig(**LORA | {"target_modules": ["c_attn"]} | change))
        with pytest.raises(ValueError, match=match):
            kdloss.base_of(other)
    for model in (build("gpt2"), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="has no adapters"):
            kdloss.base_of(model)
    with pytest.raises(TypeError, match="got str"):
        kdloss.base_of("gpt2")
    with pytest.raises(TypeError, match="move the model"):
        teacher.to("meta")
    with pytest.raises(TypeError, match="move the model"):
        kdloss.Teacher(teacher, device="meta")


def test_a_partly_trained_base_is_refused_in_the_first_step():
    _, student = base_and_adapted(CONFIGS["lora"])
    student.base_model.model.transformer.ln_f.weight.requires_grad_(True)
    distill = kdloss.Distiller(kdloss.base_of(student), kdloss.VanillaKD(1.0, 0.0))
    with pytest.raises(ValueError, match=r"ln_f.*Freeze it"):
        distill(student, **batch("gpt2"))


def test_a_compiled_or_wrapped_model_has_a_base_and_a_pickle_holds_the_model_once():
    plain, student = base_and_adapted(CONFIGS["lora"])
    expected = plain(**ids()).logits.detach()
    for wrapped in (torch.compile(student, backend="eager"), nn.ModuleDict({"module": student})):
        torch.testing.assert_close(kdloss.base_of(wrapped)(**ids()).logits, expected)
    model = kdloss.Distillation(student, kdloss.base_of(student), kdloss.VanillaKD(1.0, 0.0))
    unpickled = pickle.loads(pickle.dumps(model))
    assert unpickled.teachers[0].module.module is unpickled.student
    unpickled.eval()
    model.eval()
    for one in (model, unpickled):
        one.teacher_in_eval = True
    assert unpickled(**ids()).loss.item() == pytest.approx(model(**ids()).loss.item())
