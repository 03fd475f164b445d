"""Student and criterion as one module: whoever trains it trains the student and the criterion, never a teacher."""

import copy
import gc
import inspect
import io
import os
import pickle
import subprocess
import sys
import weakref
from types import SimpleNamespace

import distillation_processes as runs
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from families import batch as batch_of
from families import build, checkpointing
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, ViTForImageClassification
from versions import since_torch, since_transformers_5

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture
def module():
    return runs.made()


@pytest.fixture
def inputs():
    return next(iter(DataLoader(runs.rows(), runs.BATCH)))


@pytest.fixture(autouse=True)
def _reset_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def needs_full_logits():
    """A criterion whose divergence needs the logits as a tensor."""
    return kdloss.VanillaKD(divergence=kdloss.divergences.dist)


class Passes:
    """Counts how often a module runs."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1


def teacher_of(module, k=0):
    return module.teachers[k].module


def loss_and_gradients(module, inputs):
    module.zero_grad()
    loss = module(**inputs).loss
    loss.backward()
    return loss.detach(), runs.gradients(module)


# Training loops


def test_the_readme_loop_trains_student_and_projections_but_not_the_teacher():
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    model = kdloss.Distillation(student, teacher, kdloss.FeatureKD(layers="auto"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    teacher_before = {name: x.clone() for name, x in teacher.state_dict().items()}
    losses = []
    for _ in range(10):
        for batch in DataLoader(runs.rows(), runs.BATCH):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert_equal(teacher.state_dict(), teacher_before)


@since_torch(2, 6)
def test_two_processes_give_the_result_of_one(tmp_path):
    """DDP, FSDP2, Accelerate and Lightning in one test, because processes start slowly; see distillation_processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, runs.__file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    single = {name: runs.plain(criterion) for name, criterion in runs.CRITERIA.items()}
    check_each_step_against_one_process(ranks, "fsdp of blocks", single["recipe"])
    check_each_step_against_one_process(ranks, "fsdp of the whole", single["turned on"])
    for name, one in single.items():
        check_each_step_against_one_process(ranks, f"ddp, {name}", one)
        for accumulate in (1, 2):
            key = f"accelerate, {name}, {accumulate}"
            check_a_resumed_run_against_one_process(ranks, key, one)
            check_the_keys_of_a_checkpoint(load_file(tmp_path / key / "model.safetensors"), name, tied=False)
    for name in ("recipe", "turned on"):
        key = f"lightning, {name}"
        check_a_resumed_run_against_one_process(ranks, key, runs.plain(runs.CRITERIA[name], epochs=2))
        saved = torch.load(tmp_path / key / "epoch=0.ckpt")["state_dict"]
        check_the_keys_of_a_checkpoint({key.removeprefix("model."): value for key, value in saved.items()}, name)
    for results in ranks:
        assert_equal(results["checkpoint"]["weights"], results["checkpoint"]["resumed"])
        assert results["checkpoint"]["step"] == 4
        check_the_keys_of_a_checkpoint(results["checkpoint"]["keys"], "turned on")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def check_each_step_against_one_process(ranks, key, one):
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results[key]["gradients"], one["gradients"], **CLOSE)
        torch.testing.assert_close(results[key]["weights"], one["weights"], **CLOSE)
        share = slice(2 * rank, 2 * rank + 2)
        expected = [logits[share] for logits in one["logits"]]
        torch.testing.assert_close(results[key]["logits"], expected, rtol=1e-4, atol=1e-6)
    assert_equal(ranks[0][key]["weights"], ranks[1][key]["weights"])
    assert any("projections" in name for name in one["weights"])


def check_a_resumed_run_against_one_process(ranks, key, one):
    for results in ranks:
        torch.testing.assert_close(results[key]["weights"], one["weights"], **CLOSE)
        assert_equal(results[key]["weights"], results[f"{key}, resumed"]["weights"])
    assert_equal(ranks[0][key]["weights"], ranks[1][key]["weights"])
    if "turned on" in key:
        assert results[key]["step"] == results[f"{key}, resumed"]["step"] == len(one["gradients"])


def check_the_keys_of_a_checkpoint(keys, criterion, tied=True):
    expected = {name for name in runs.made(runs.CRITERIA[criterion]).state_dict() if tied or "lm_head" not in name}
    assert set(keys) == expected
    assert ("criterion.step" in expected) == (criterion == "turned on")
    assert all(name.startswith(("student.", "criterion.")) for name in expected)


@since_torch(2, 6)
@pytest.mark.parametrize("whole_only", [False, True])
def test_fsdp_in_one_process_changes_nothing(whole_only):
    one = runs.plain(runs.turned_on)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = runs.plain(runs.turned_on, wrap=lambda model: runs.sharded(model, whole_only))
        stored = runs.kept_apart()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, one, **CLOSE)
    assert_equal(stored["weights"], stored["resumed"])


def test_a_term_of_weight_zero_gives_no_gradient_to_parameters_sharded_by_zero_3(inputs):
    """Such a parameter is empty outside its module's pass, so a gradient of zeros would be empty as well."""
    module = runs.made(runs.switched_off)
    unsharded, sharded = list(module.criterion.parameters())[:2]
    sharded.ds_id = 1
    module(**inputs).loss.backward()
    assert unsharded.grad.count_nonzero() == 0
    assert sharded.grad is None


def test_a_scheduled_sum_is_restored_from_a_distributed_state_dict():
    stored = runs.kept_apart(sharding=False)
    assert_equal(stored["weights"], stored["resumed"])
    torch.testing.assert_close(stored["weights"], runs.plain(runs.turned_on)["weights"], **CLOSE)
    assert stored["step"] == 4


def test_accelerate_in_bfloat16_gives_nearly_the_same_losses(tmp_path):
    half = runs.accelerated(tmp_path, precision="bf16")
    full = runs.accelerated(tmp_path)
    assert half["losses"] == pytest.approx(full["losses"], rel=2e-2)
    assert half["losses"] != full["losses"]
    assert full["kinds"]["logits"] == "torch.float32"
    assert half["kinds"]["logits"] == "torch.bfloat16"  # Accelerate converts tensors, and these logits are lazy
    assert all(weight.dtype == torch.float32 for weight in half["weights"].values())
    full_logits = runs.accelerated(tmp_path, needs_full_logits, precision="bf16")
    assert full_logits["kinds"]["logits"] == "torch.float32"


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:Checkpoint directory .* exists"
)  # Lightning warns
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_in_one_process_trains_logs_and_resumes(tmp_path, accumulate):
    from lightning_runs import lightened

    found = lightened(tmp_path, runs.turned_on, accumulate)
    one = runs.plain(runs.turned_on, epochs=2)
    torch.testing.assert_close(found["weights"], one["weights"], **CLOSE)
    assert found["step"] == 8
    assert {"ce", "kd", "feature", "validation"} <= set(found["metrics"])
    again = lightened(tmp_path, runs.turned_on, accumulate, resume=tmp_path / "epoch=0.ckpt")
    assert_equal(again["weights"], found["weights"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_hugging_face_trainer_trains_the_module(tmp_path, accumulate):
    """Without `remove_unused_columns=False`, the Trainer drops the columns that the module's signature doesn't name."""
    teacher, student = build("llama", width=24, depth=4), build("llama", depth=2, seed=1)
    module = kdloss.Distillation(student, teacher, kdloss.FeatureKD(logit_weight=1.0))
    expected = copy.deepcopy(module)
    settings = TrainingArguments(
        str(tmp_path), optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=4,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_steps=2,
        per_device_train_batch_size=runs.BATCH // accumulate, gradient_accumulation_steps=accumulate,
        remove_unused_columns=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return None

    trainer = InOrder(module, settings, train_dataset=runs.rows(), eval_dataset=runs.rows(1))
    trainer.train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.3)
    for batch in DataLoader(runs.rows(), runs.BATCH):
        expected(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(runs.weights(module), runs.weights(expected), **CLOSE)
    saved = load_file(tmp_path / "checkpoint-4/model.safetensors")
    assert_equal(saved, module.state_dict())
    direct = module.eval()(**next(iter(DataLoader(runs.rows(1), runs.BATCH)))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_in_the_plain_trainer_the_students_loss_is_that_of_the_student_alone(tmp_path, kind):
    """The Trainer finds the student's configuration and kind of loss, so that it counts the same labels."""

    def run(model, student):
        settings = TrainingArguments(
            str(tmp_path), optim="sgd", learning_rate=0.3, max_steps=2, max_grad_norm=0.0, report_to="none",
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
            per_device_train_batch_size=2, remove_unused_columns=False,
            gradient_accumulation_steps=1 if kind == "t5" else 2,  # T5 alone may not be divided
        )  # fmt: skip
        data = batch_of(kind)
        data = [{name: x[i % 2] for name, x in data.items()} for i in range(8)]
        trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data)
        before = copy.deepcopy(student.state_dict())
        losses = trainer.evaluate()["eval_loss"], trainer.train().training_loss
        return {name: x - before[name] for name, x in student.state_dict().items()}, losses

    alone, student = build(kind, seed=1), build(kind, seed=1)
    module = kdloss.Distillation(student, build(kind), kdloss.VanillaKD(alpha=1.0))
    expected, losses = run(alone, alone)
    found, ours = run(module, student)
    assert ours == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_distillation_has_its_students_configuration_and_none_without():
    student = build("llama", depth=2)
    module = kdloss.Distillation(student, None, kdloss.VanillaKD(alpha=1.0))
    assert module.config is student.config
    assert copy.deepcopy(module).config is not student.config
    assert pickle.loads(pickle.dumps(module)).config.hidden_size == student.config.hidden_size
    assert not any("config" in name for name in module.state_dict())
    plain = kdloss.Distillation(nn.Linear(2, 2), None, kdloss.VanillaKD(alpha=1.0))
    assert not hasattr(plain, "config")
    assert not hasattr(plain, "loss_type")


# Compilation and checkpointing


def counting(counter):
    def backend(graph, _):
        def run(*args):
            counter.append(1)
            return graph(*args)

        return run

    return backend


@since_torch(2, 6)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo warns
@pytest.mark.parametrize("in_place", [False, True])
def test_compiling_the_module_leaves_it_eager_and_its_compiled_blocks_compiled(module, inputs, in_place):
    loss, expected = loss_and_gradients(module, inputs)
    ran = []
    for block in kdloss.layers.find_blocks(module.student):
        block.compile(backend=counting(ran))
    compiled = module
    if in_place:
        module.compile(backend="eager")
    else:
        compiled = torch.compile(module, backend="eager")
    for step in (1, 2):
        found, gradients = loss_and_gradients(compiled, inputs)
        assert len(ran) == 2 * step
    torch.testing.assert_close(found, loss, **CLOSE)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close(gradients, expected, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=since_transformers_5)])
@pytest.mark.parametrize("criterion", [kdloss.VanillaKD, runs.recipe])
def test_checkpointing_inside_the_student_gives_the_plain_gradient(inputs, criterion, reentrant):
    module = runs.made(criterion)
    loss, expected = loss_and_gradients(module, inputs)
    checkpointing(module.student, {"use_reentrant": reentrant})
    attention = Passes(module.student.transformer.h[0].attn)
    found, gradients = loss_and_gradients(module.train(), inputs)
    assert attention.count == 2  # the second pass recomputes it in backward
    assert torch.equal(found, loss)
    torch.testing.assert_close(gradients, expected, **CLOSE)


@since_torch(2, 6)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("criterion", [kdloss.VanillaKD, runs.recipe])
def test_checkpointing_around_the_whole_step_gives_the_plain_gradient(inputs, criterion, reentrant):
    loss, expected = loss_and_gradients(runs.made(criterion), inputs)
    module, one = runs.made(criterion), torch.ones((), requires_grad=True)
    for _ in (1, 2):  # the second step uses what the first one measured
        module.zero_grad()
        found = checkpoint(lambda x: x * module(**inputs).loss, one, use_reentrant=reentrant)
        found.backward()
        assert torch.equal(found.detach(), loss)
        torch.testing.assert_close(runs.gradients(module), expected, **CLOSE)


# What a step returns


def test_a_step_has_attributes_and_keys(module, inputs):
    step = module(**inputs)
    assert isinstance(step, dict)
    assert list(step) == ["loss", "logits", "components", "output"]
    assert step.loss is step["loss"]
    assert step.output is step["output"]
    assert set(step.components) == {"ce", "kd", "feature", "feature/0-0", "feature/1-1"}
    assert torch.equal(step.logits, step["logits"])
    assert not hasattr(step, "hidden_states")
    with pytest.raises(AttributeError, match=r"a step has \['loss', .*not 'hidden_states'"):
        step.hidden_states  # noqa: B018
    step.loss = step.loss / 2
    assert step["loss"] is step.loss


def test_logits_are_computed_only_on_request(module, inputs, monkeypatch):
    computed, dense = [], kdloss.LazyLogits.dense
    monkeypatch.setattr(kdloss.LazyLogits, "dense", lambda lazy: computed.append(lazy.shape) or dense(lazy))
    step = module.eval()(input_ids=inputs["input_ids"])
    assert isinstance(step.output.logits, kdloss.LazyLogits)
    assert not any(isinstance(value, torch.Tensor) for value in step.values())
    computed.clear()  # the first pass computes one position to measure the head
    assert step.loss is None
    assert step.logits.shape == (4, 8, 61)
    assert computed == [(4, 8, 61)]
    torch.testing.assert_close(step["logits"], module.student(input_ids=inputs["input_ids"]).logits)


def test_a_step_survives_pytrees_pickles_and_copies(module, inputs):
    with torch.no_grad():
        step = module(**inputs)
    leaves, tree = tree_flatten(step)
    assert any(leaf is step.loss for leaf in leaves)
    for twin in (tree_unflatten(leaves, tree), pickle.loads(pickle.dumps(step)), copy.deepcopy(step)):
        assert type(twin) is kdloss.Distilled
        assert list(twin) == list(step)
        assert torch.equal(twin.loss, step.loss)
        assert torch.equal(twin.logits, step.logits)
        assert twin.components == step.components


def test_labels_is_a_named_parameter_of_forward():
    assert "labels" in inspect.signature(kdloss.Distillation.forward).parameters


# Evaluation


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, kdloss.schedules.linear(0.0, 1.0, steps=10)])
def test_in_evaluation_the_loss_is_plain_cross_entropy_and_no_teacher_runs(inputs, alpha):
    module = runs.made(lambda: kdloss.FeatureKD(alpha=alpha, logit_weight=1.0)).eval()
    teacher = Passes(teacher_of(module))
    step = module(**inputs)
    assert step.loss.item() == pytest.approx(module.student(**inputs).loss.item(), rel=1e-6)
    assert set(step.components) == {"ce"}
    unlabelled = module(**{name: x for name, x in inputs.items() if name != "labels"})
    assert unlabelled.loss is None
    assert unlabelled.components == {}
    assert unlabelled.logits.shape == (4, 8, 61)
    assert teacher.count == 0
    module.train()(**inputs)
    assert teacher.count == (0 if alpha == 1.0 else 1)


def test_in_evaluation_teachers_run_on_request(inputs):
    trained = runs.made().train()(**inputs).loss
    module = runs.made()
    module.teacher_in_eval = True
    assert torch.equal(module.eval()(**inputs).loss, trained)
    other = kdloss.Distillation(build("gpt2", depth=2, seed=1), build("gpt2"), kdloss.VanillaKD(), teacher_in_eval=True)
    assert set(other.eval()(**inputs).components) == {"ce", "kd"}


def test_training_and_evaluation_do_not_change_the_teacher(module, inputs):
    teacher, ran = teacher_of(module).train(), []
    teacher.transformer.h[1].eval()
    teacher.transformer.h[0].register_forward_hook(lambda m, *_: ran.append((m.training, torch.is_grad_enabled())))
    modes = [m.training for m in teacher.modules()]
    wanted = [p.requires_grad for p in teacher.parameters()]
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    for mode in (True, False, True):
        module.train(mode)
        assert module.student.training == module.criterion.training == mode
        assert [m.training for m in teacher.modules()] == modes
    module.requires_grad_(True)
    module(**inputs).loss.backward()
    module.zero_grad()
    assert ran == [(False, False)]
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == wanted
    assert all(p.grad is None for p in teacher.parameters())
    assert_equal(teacher.state_dict(), before)


def test_trained_parameters_are_those_of_student_and_criterion(module):
    assert [name for name, _ in module.named_children()] == ["student", "criterion"]
    theirs = {p.data_ptr() for p in teacher_of(module).parameters()}
    for mine in (module.parameters(), module.state_dict().values(), module.buffers()):
        assert not any(tensor.data_ptr() in theirs for tensor in mine)
    assert not any(part is teacher_of(module) for part in module.modules())
    projections = {id(p) for p in module.criterion.parameters()}
    assert len(projections) == 4
    assert projections <= {id(p) for p in module.parameters()}


# A stored teacher


def test_a_stored_teacher_gives_the_loss_of_the_live_one(inputs):
    teacher, student = build("gpt2", depth=4).eval(), build("gpt2", depth=2, seed=1)
    live = kdloss.Distillation(student, teacher, kdloss.VanillaKD())
    stored = kdloss.Distillation(student, None, kdloss.VanillaKD())
    with torch.no_grad():
        logits = teacher(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = live(**inputs).loss
    for output in (logits, SimpleNamespace(logits=logits), [logits], kdloss.TopKLogits.of(logits, 61)):
        torch.testing.assert_close(stored(**inputs, teacher=output).loss, expected, rtol=1e-5, atol=1e-6)
    stored.eval()
    assert set(stored(**inputs).components) == {"ce"}
    assert set(stored(**inputs, teacher=logits).components) == {"ce", "kd"}


def test_stored_outputs_without_a_stored_teacher_are_refused(module, inputs):
    with pytest.raises(TypeError, match=r"0 of the 1 teachers are stored.*leave it out, or write None"):
        module(**inputs, teacher=torch.zeros(4, 8, 61))
    stored = kdloss.Distillation(module.student, None, kdloss.VanillaKD())
    with pytest.raises(TypeError, match=r"the outputs of 2 stored teachers, but 1 of the 1 teachers are stored"):
        stored(**inputs, teacher=[torch.zeros(4, 8, 61)] * 2)


def test_a_call_without_a_stored_teachers_outputs_says_how_to_pass_them(module, inputs):
    stored = kdloss.Distillation(module.student, None, kdloss.VanillaKD())
    with pytest.raises(TypeError, match=r"teacher 0 is stored.*model\(\*\*batch, teacher=logits\)"):
        stored(**inputs)
    second = kdloss.Distillation(module.student, [build("gpt2"), None], kdloss.MultiTeacherKD())
    with pytest.raises(TypeError, match="teacher 1 is stored"):
        second(**inputs)
    alone = kdloss.Distillation(module.student, None, kdloss.VanillaKD(alpha=1.0))
    assert alone(**inputs).loss.isfinite()  # nothing reads the teacher


# Device and dtype of a teacher


def test_a_teacher_follows_the_student_but_not_its_dtype(module, inputs, monkeypatch):
    moves = []
    monkeypatch.setattr("kdloss.teacher.place", lambda module: torch.device("cuda:7"))  # any other device
    monkeypatch.setattr(teacher_of(module), "to", lambda *args, **settings: moves.append((args, settings)))
    here = ((torch.device("cpu"),), {})
    for n, move in enumerate([module.cpu, module.double, module.bfloat16, module.float], start=1):
        move()
        assert moves == [here] * n
    monkeypatch.setattr("kdloss.teacher.place", lambda module: torch.device("cpu"))
    module.double()
    module(**inputs)
    assert moves == [here] * 4  # a teacher that is already there is not moved
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert {p.dtype for p in teacher_of(module).parameters()} == {torch.float32}


def test_a_step_moves_a_teacher_to_the_students_device(module, inputs, monkeypatch):
    moves = []
    monkeypatch.setattr("kdloss.teacher.place", lambda module: torch.device("cuda:7"))
    monkeypatch.setattr(teacher_of(module), "to", lambda *args: moves.append(args))
    module(**inputs)
    assert moves == [(torch.device("cpu"),)]


def test_a_teacher_keeps_its_weights_while_the_student_is_on_meta(module):
    """While Accelerate shards a module, the module is on "meta"."""
    module.to("meta")
    assert all(p.is_meta for p in module.parameters())
    assert not any(p.is_meta for p in teacher_of(module).parameters())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_teacher_of_another_dtype_teaches(inputs, dtypes):
    full, module = runs.made(), runs.made()
    module.to(dtypes[0])
    teacher_of(module).to(dtypes[1])
    step = module(**inputs)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(full(**inputs).loss.item(), rel=2e-2)
    assert {p.grad.dtype for p in module.parameters()} == {dtypes[0]}
    assert {p.dtype for p in teacher_of(module).parameters()} == {dtypes[1]}


def quantised(model):
    model.is_quantized = True


def dispatched(model):
    model.hf_device_map = {"": 0}


def hooked(model):
    model._hf_hook = object()


def offloaded(model):
    model.transformer.h[0].to("meta")


def sharded(model):
    model.lm_head.weight.ds_id = 3


def on_two_devices(model):
    model.lm_head.weight = nn.Parameter(OnGpu(model.lm_head.weight.detach()))


class OnGpu(torch.Tensor):
    """A CPU tensor that reports a GPU as its device."""

    device = torch.device("cuda:1")


@pytest.mark.parametrize("placed", [quantised, dispatched, hooked, offloaded, sharded, on_two_devices])
def test_teachers_that_cannot_be_moved_stay_where_they_are(module, placed, monkeypatch):
    teacher = teacher_of(module)
    placed(teacher)
    monkeypatch.setattr("kdloss.teacher.place", lambda module: torch.device("cuda:7"))
    monkeypatch.setattr(teacher, "to", lambda *_: pytest.fail("was moved"))
    module.cpu()
    kdloss.Teacher(teacher, device="cpu")


def test_a_teacher_with_a_device_stays_there_and_its_inputs_and_outputs_are_moved(inputs, monkeypatch):
    expected, _ = loss_and_gradients(runs.made(), inputs)
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    moves = []
    original = kdloss.teacher.moved
    monkeypatch.setattr("kdloss.teacher.moved", lambda x, device: moves.append((x, device)) or original(x, device))
    monkeypatch.setattr("kdloss._passes.moved", lambda x, device: moves.append((x, device)) or original(x, device))
    torch.manual_seed(0)
    on_cpu = kdloss.Teacher(teacher, device="cpu")
    module = kdloss.Distillation(student, on_cpu, runs.recipe())
    monkeypatch.setattr("kdloss.teacher.place", lambda module: torch.device("cuda:7"))
    monkeypatch.setattr(teacher, "to", lambda *_: pytest.fail("was moved"))
    module.cpu()
    step = module(**inputs)
    torch.testing.assert_close(step.loss.detach(), expected, **CLOSE)
    (args, keywords), others = [x for x, device in moves if device == "cpu"], [x for x, d in moves if d != "cpu"]
    assert args == ()
    assert {"input_ids", "attention_mask"} <= set(keywords)
    assert all(device == torch.device("cpu") for x, device in moves[2:])
    assert isinstance(others[0].logits, kdloss.LazyLogits)  # first the output, then the features of each term
    assert [set(features) for features in others[1:]] == [{0, 1}]


def test_lazy_logits_are_moved_to_another_device():
    lazy = kdloss.LazyLogits(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5), softcap=3.0)
    moved = kdloss.teacher.moved({"logits": lazy, "n": 3}, "meta")
    assert moved["logits"].hidden.is_meta
    assert moved["logits"].bias.is_meta
    assert moved["logits"].softcap == 3.0
    assert moved["n"] == 3


# Inputs of a teacher


class RecordsInputs(nn.Module):
    """A linear model that records its inputs."""

    def __init__(self, width=4):
        super().__init__()
        self.linear, self.seen = nn.Linear(width, 3), []

    def forward(self, x, scale=1.0):
        self.seen.append((x, scale))
        return self.linear(x) * scale


def test_a_teacher_reads_a_positional_batch_in_its_own_normalisation():
    student, teacher = RecordsInputs(), RecordsInputs()
    module = kdloss.Distillation(student, kdloss.Teacher(teacher, lambda x: x / 255), kdloss.VanillaKD())
    x, y = torch.randn(2, 4), torch.tensor([0, 2])
    loss = module(x, labels=y).loss
    assert torch.equal(teacher.seen[0][0], x / 255)
    assert torch.equal(student.seen[0][0], x)
    expected = kdloss.VanillaKD()(student(x), teacher(x / 255), y)
    torch.testing.assert_close(loss, expected)
    module = kdloss.Distillation(student, kdloss.Teacher(teacher, lambda x: (x / 2, 3.0)), kdloss.VanillaKD())
    module(x, labels=y)
    assert teacher.seen[-1][1] == 3.0
    module = kdloss.Distillation(
        student, kdloss.Teacher(teacher, lambda x, rest: {"x": x, "scale": 2 * rest["scale"]}), kdloss.VanillaKD()
    )
    module(x, scale=2.0, labels=y)
    assert (student.seen[-1][1], teacher.seen[-1][1]) == (2.0, 4.0)


def test_a_teacher_reads_its_own_columns_which_the_student_does_not_get(inputs):
    teacher, student = build("gpt2", depth=4).eval(), build("gpt2", depth=2, seed=1)
    received = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_pre_hook(lambda m, a, k, n=name: received[n].append(k), with_kwargs=True)

    def of_teacher(columns):
        return {
            "input_ids": columns["teacher_input_ids"],
            "attention_mask": columns["teacher_attention_mask"],
        }

    theirs = {"teacher_input_ids": inputs["input_ids"].flip(0), "teacher_attention_mask": inputs["attention_mask"]}
    module = kdloss.Distillation(student, kdloss.Teacher(teacher, of_teacher), kdloss.VanillaKD())
    loss = module(**inputs, **theirs).loss
    assert torch.equal(received["teacher"][0]["input_ids"], inputs["input_ids"].flip(0))
    assert not any(name.startswith("teacher_") for name in received["student"][0])
    with torch.no_grad():
        target = teacher(**of_teacher(theirs)).logits
    expected = kdloss.Distillation(student, None, kdloss.VanillaKD())(**inputs, teacher=target).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_reads_images_of_another_resolution():
    teacher = build("vit", width=24, depth=4).eval()
    config = copy.deepcopy(build("vit", depth=2).config)
    config.image_size, config.patch_size = 8, 4
    student = ViTForImageClassification(config)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])

    def larger(columns):
        return {"pixel_values": F.interpolate(columns["pixel_values"], scale_factor=2.0)}

    module = kdloss.Distillation(student, kdloss.Teacher(teacher, larger), kdloss.VanillaKD())
    loss = module(pixel_values=images, labels=labels).loss
    with torch.no_grad():
        target = teacher(**larger({"pixel_values": images})).logits
    torch.testing.assert_close(loss, kdloss.VanillaKD()(student(images).logits, target, labels))


# Copies and files


def test_copies_share_the_teacher_and_train_separately(module, inputs):
    twin = copy.deepcopy(module)
    assert twin.teachers[0] is module.teachers[0]
    mine = {p.data_ptr() for p in module.parameters()}
    assert not any(p.data_ptr() in mine for p in twin.parameters())
    before = {name: x.clone() for name, x in module.state_dict().items()}
    optimizer = runs.sgd(twin)
    twin(**inputs).loss.backward()
    optimizer.step()
    twin.criterion.advance()
    assert_equal(module.state_dict(), before)
    assert all(not torch.equal(x, before[name]) for name, x in twin.criterion.state_dict(prefix="criterion.").items())
    assert (module.criterion.step, twin.criterion.step) == (0, 1)
    assert not torch.equal(twin(**inputs).loss, module(**inputs).loss)
    loss, expected = loss_and_gradients(module, inputs)
    again, gradients = loss_and_gradients(copy.deepcopy(module), inputs)
    assert torch.equal(loss, again)
    assert_equal(gradients, expected)


def test_a_moving_average_follows_student_and_projections(module, inputs):
    average = AveragedModel(module)
    optimizer = runs.sgd(module)
    seen = []
    for _ in range(2):
        module(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(module)
        seen.append(runs.weights(module))
    expected = {name: (seen[0][name] + seen[1][name]) / 2 for name in seen[0]}
    torch.testing.assert_close(runs.weights(average), expected, **CLOSE)
    assert average.module.teachers[0] is module.teachers[0]
    assert average.eval()(**inputs).loss.isfinite()


@pytest.mark.parametrize("used", [False, True])
def test_training_continues_from_a_pickle(module, inputs, used):
    if used:
        module(**inputs)
    module.criterion.advance()
    twin = pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for one in (twin, torch.load(file, weights_only=False)):
        loss, gradients = loss_and_gradients(one, inputs)
        expected = loss_and_gradients(module, inputs)
        assert torch.equal(loss, expected[0])
        assert_equal(gradients, expected[1])
        assert one.criterion.step == 1


def test_a_pickled_distiller_gives_the_same_loss(inputs):
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    distill = kdloss.Distiller(teacher, runs.recipe()).prepare(student)
    loss = distill(student, **inputs).loss
    assert torch.equal(pickle.loads(pickle.dumps(distill))(student, **inputs).loss, loss)


def test_a_state_dict_loads_strictly_into_a_fresh_module(inputs, tmp_path):
    module = runs.made(runs.turned_on)
    for _ in range(2):
        module(**inputs).loss.backward()
        module.criterion.advance()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.01
    torch.save(module.state_dict(), tmp_path / "module.pt")
    torch.manual_seed(5)
    fresh = runs.made(runs.turned_on)
    fresh.load_state_dict(torch.load(tmp_path / "module.pt"))
    assert fresh.criterion.step == 2
    assert torch.equal(fresh(**inputs).loss, module(**inputs).loss)
    module.student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_equal(again.state_dict(), module.student.state_dict())


class Plain(nn.Module):
    """A model without a configuration."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_loading_before_projections_exist_raises_an_error_that_names_prepare():
    def unprepared():
        criterion = kdloss.CrossEntropy() + kdloss.Features(["body"], pairing="same")
        return kdloss.Distillation(Plain(5), Plain(7), criterion)

    x = torch.randn(2, 4)
    module, fresh = unprepared().prepare(x), unprepared()
    wrapper = nn.ModuleDict({"model": fresh})  # as in a LightningModule
    state = module.state_dict()
    key = "criterion.terms.feature.projections.body.weight"
    with pytest.raises(RuntimeError, match=rf"the parameter '{key}', .*model\.prepare\(\*\*batch\) before"):
        fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"model\.{key}"'):
        wrapper.load_state_dict({f"model.{name}": value for name, value in state.items()})
    of_criterion = {name.removeprefix("criterion."): x for name, x in state.items() if name.startswith("criterion.")}
    with pytest.raises(RuntimeError, match=r"'terms\.feature\.projections.*distill\.prepare\(student, \*\*batch\)"):
        fresh.criterion.load_state_dict(of_criterion)
    fresh.load_state_dict(state, strict=False)
    fresh.prepare(x).load_state_dict(state)
    assert_equal(fresh.state_dict(), state)


def test_a_replaced_criterion_is_refused(module, inputs):
    module.criterion = kdloss.VanillaKD()
    with pytest.raises(RuntimeError, match=r"criterion was replaced.*write Distillation\(model.student"):
        module(**inputs)


def test_a_replaced_student_is_trained(module, inputs):
    module.student = copy.deepcopy(module.student)
    loss, gradients = loss_and_gradients(module, inputs)
    expected, expected_gradients = loss_and_gradients(runs.made(), inputs)
    assert torch.equal(loss, expected)
    assert_equal(gradients, expected_gradients)


def test_tie_weights_restores_the_ties_of_the_student(module):
    student = module.student
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
    module.tie_weights()
    assert student.lm_head.weight is student.transformer.wte.weight
    kdloss.Distillation(Plain(5), None, kdloss.VanillaKD()).tie_weights()  # a model without ties


# Memory


def record_outputs_of_blocks(model, refs):
    for block in kdloss.layers.find_blocks(model):
        block.register_forward_hook(
            lambda m, a, out: refs.append(weakref.ref(out if isinstance(out, torch.Tensor) else out[0]))
        )


def alive(refs):
    return sum(ref() is not None for ref in refs)


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_features_of_a_teacher_are_freed_before_the_next_one_runs_and_none_remain_after_the_step(inputs):
    teachers = [build("gpt2", width=24, depth=4, seed=k) for k in range(3)]
    student, of_student, of_teachers = build("gpt2", depth=2), [], [[], [], []]
    at_start, at_sweep = [], []

    def divergence(student, teacher, temperature=1.0):
        at_sweep.append([alive(refs) for refs in of_teachers])
        return kdloss.divergences.forward_kl(student, teacher, temperature=temperature)

    criterion = kdloss.CrossEntropy() + kdloss.Logits(divergence, teacher=2)
    for k in range(3):
        criterion += kdloss.Features("all", pairing="first", teacher=k, name=f"features of {k}")
    module = kdloss.Distillation(student, teachers, criterion)
    module(**inputs).loss.backward()  # the first step measures what later steps reuse
    record_outputs_of_blocks(student, of_student)
    for k, teacher in enumerate(teachers):
        record_outputs_of_blocks(teacher, of_teachers[k])
        teacher.register_forward_pre_hook(lambda *_: at_start.append([alive(refs) for refs in of_teachers]))
    at_sweep.clear()
    step = module(**inputs)
    assert len(of_teachers[2]) == 4
    assert at_start == [[0, 0, 0]] * 3
    assert at_sweep[0] == [0, 0, 0]
    assert alive(of_student) == 2  # needed for backward
    step.loss.backward()
    del step
    assert alive(of_student) == 0
    assert [alive(refs) for refs in of_teachers] == [0, 0, 0]


@pytest.mark.usefixtures("no_garbage_collection")
def test_nothing_is_held_after_a_step_without_backward(module, inputs):
    refs, outputs = [], []
    module(**inputs)
    record_outputs_of_blocks(module.student, refs)
    record_outputs_of_blocks(teacher_of(module), refs)
    module.student.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out.logits)))
    module(**inputs)
    module.eval()(**inputs)
    assert len(refs) == 2 + 4 + 2  # the student ran twice, the teacher once
    assert alive(refs) == alive(outputs) == 0
