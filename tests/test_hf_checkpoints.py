"""Checkpoints of a distilling Trainer: a run interrupted at any point ends like an uninterrupted run."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from hf_runs import make, pair, seven_steps, trained
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

import kdloss
from kdloss.hf import newest_complete

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}


def tensors_of(folder):
    """Every tensor in every file of a folder, by name."""
    tensors = {}

    def collect(name, value):
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                collect(f"{name}/{i}", inner)
        elif hasattr(value, "__dict__"):
            collect(name, vars(value))

    for file in Path(folder).iterdir():
        if file.suffix == ".safetensors":
            collect(file.name, load_file(file))
        elif file.suffix in (".pt", ".pth", ".bin"):
            collect(file.name, torch.load(file, weights_only=False))
    return tensors


def test_a_checkpoint_holds_student_and_projections_and_no_teacher(tmp_path):
    student, teacher, criterion = pair()
    make(tmp_path, student, teacher, criterion, **SAVING | {"max_steps": 1, "save_steps": 1}).train()
    checkpoint = tmp_path / "checkpoint-1"
    tensors = tensors_of(checkpoint)
    projections = criterion.state_dict()
    for name, value in projections.items():
        assert torch.equal(tensors.pop(f"criterion.safetensors/{name}"), value)
    weights_of_student = {name: p for name, p in student.state_dict().items() if name != "lm_head.weight"}  # tied
    for name, value in weights_of_student.items():
        assert torch.equal(tensors.pop(f"model.safetensors/{name}"), value)
    # The remaining tensors are two moments and a counter for each weight, and the states of random generators.
    shapes = sorted(tuple(x.shape) for n, x in tensors.items() if n.startswith("optimizer") and x.ndim)
    weights = [*student.parameters(), *projections.values()]
    assert shapes == sorted(tuple(p.shape) for p in weights for _ in range(2))
    rest = [x for n, x in tensors.items() if not n.startswith("optimizer")]
    assert all(x.dtype in (torch.uint8, torch.int64) for x in rest)
    values = {p.flatten()[:3].sum().item() for p in teacher.parameters() if p.std() > 0}
    assert not any(x.flatten()[:3].sum().item() in values for x in tensors_of(checkpoint).values())
    for file in checkpoint.iterdir():  # no file is larger than the tensors in it
        inside = [x.nbytes + 1000 for n, x in tensors_of(checkpoint).items() if n.startswith(file.name)]
        assert file.stat().st_size < sum(inside) + 20_000


def scheduled():
    """A scheduled weight, a scheduled temperature and trained projections, all of which must be restored."""
    warm = kdloss.schedules.warmup(4, 1.0)
    return 0.5 * kdloss.CrossEntropy() + warm * kdloss.Features("last") + kdloss.Logits(
        temperature=kdloss.schedules.linear(4.0, 1.0, steps=5)
    )  # fmt: skip


def weighted():
    """A balanced sum in which a trained number weights all terms, and a learned weighting two of them."""
    learned = kdloss.weighting.Learned(1) * (kdloss.Logits() + kdloss.Features("last"))
    terms = nn.Parameter(torch.ones(())) * (kdloss.CrossEntropy() + learned)
    return kdloss.Sum(terms, balance=kdloss.balancing.RunningMagnitude())


@pytest.mark.parametrize(
    "criterion", [kdloss.VanillaKD, lambda: kdloss.FeatureKD(logit_weight=1.0), scheduled, weighted]
)
def test_resumed_training_ends_with_the_same_weights(criterion, tmp_path):
    def train(**resumed):
        student, teacher, restored = pair(criterion=criterion(), dropout=0.1)
        make(tmp_path, student, teacher, restored, max_steps=5, per_device_train_batch_size=2, **SAVING).train(
            **resumed
        )
        assert restored.step == 5 or not restored.scheduled
        return trained(student, restored)

    uninterrupted = train()
    assert (tmp_path / "checkpoint-2/criterion.safetensors").is_file() == (criterion is not kdloss.VanillaKD)
    shutil.rmtree(tmp_path / "checkpoint-5")
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        assert all(map(torch.equal, train(resume_from_checkpoint=checkpoint), uninterrupted))
    assert all(map(torch.equal, train(resume_from_checkpoint=True), uninterrupted))  # no step remains


def test_a_checkpoint_of_a_run_without_these_projections_is_refused(tmp_path):
    make(tmp_path, *pair(criterion=kdloss.VanillaKD()), **SAVING).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no criterion.safetensors.*another output_dir"):
        make(tmp_path, *pair(), max_steps=3, **SAVING).train(resume_from_checkpoint=True)


def test_loading_the_best_student_restores_its_projections(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "worst"}
    student, teacher, criterion = pair()
    settings = SAVING | best | {"save_steps": 1, "max_steps": 3, "greater_is_better": True}
    trainer = make(tmp_path, student, teacher, criterion, **settings)
    trainer.compute_metrics = lambda result: {"worst": -trainer.state.global_step}  # the first step is the best
    trainer.train()
    first = load_file(tmp_path / "checkpoint-1/criterion.safetensors")
    assert all(torch.equal(first[name], value) for name, value in criterion.state_dict().items())
    last = load_file(tmp_path / "checkpoint-3/criterion.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_checkpoint_is_incomplete_while_it_is_overwritten(tmp_path, monkeypatch):
    def train():
        make(tmp_path, *pair(), save_strategy="steps", save_steps=2).train()

    train()
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert (tmp_path / "checkpoint-2/model.safetensors").is_file()
    assert newest_complete(tmp_path) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_lora_students_projections_train_and_its_base_does_not(tmp_path):
    from peft import LoraConfig, get_peft_model

    def train(**resumed):
        student, teacher, criterion = pair("llama", dropout=0.1)
        torch.manual_seed(3)
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
        initial = {name: p.detach().clone() for name, p in student.named_parameters()}
        trainer = make(tmp_path, student, teacher, criterion, max_steps=4, per_device_train_batch_size=2, **SAVING)
        before = [p.detach().clone() for p in criterion.parameters()]
        trainer.train(**resumed)
        assert all(torch.equal(p, initial[n]) != ("lora_" in n) for n, p in student.named_parameters())
        assert not any(map(torch.equal, before, criterion.parameters()))
        return trained(student, criterion)

    uninterrupted = train()
    checkpoint = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "criterion.safetensors"} <= {f.name for f in checkpoint.iterdir()}
    assert not any("layer_norm" in name or ".base_layer" in name for name in tensors_of(checkpoint))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert all(map(torch.equal, train(resume_from_checkpoint=str(checkpoint)), uninterrupted))


# --- killed processes, full disks ----------------------------------------------------------------


def saved(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The folder of an uninterrupted run, and the number of function calls in which it wrote a checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(seven_steps, str(folder), "save") == 0
    return folder, int((folder / "calls").read_text())


@pytest.mark.parametrize(
    ("where", "at", "resumes_from"),
    [
        ("step", 300, 4),
        *(("save", fraction, 2) for fraction in (0.0, 0.1, 0.3, 0.5, 0.7)),
        ("state", None, 2),
        ("rotation", None, 4),
        ("end", 1, 7),
    ],
)
def test_a_run_killed_at_any_point_resumes_to_the_same_end(where, at, resumes_from, run, uninterrupted, tmp_path):
    reference, calls = uninterrupted
    at = max(1, int(at * calls)) if isinstance(at, float) else at
    assert run(seven_steps, str(tmp_path), where, at) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert run(seven_steps, str(tmp_path)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", str(resumes_from)]
    assert saved(tmp_path / "final") == saved(reference / "final")
    assert set(saved(tmp_path / "final")) == {"model.safetensors", "criterion.safetensors"}
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-7"]


@pytest.mark.parametrize("full_at", ["model.safetensors", "criterion.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_only_complete_checkpoints_and_is_reported(full_at, run, uninterrupted, tmp_path):
    reference, _ = uninterrupted
    sizes = {f.name: f.stat().st_size for f in (reference / "checkpoint-7").iterdir()}
    assert run(seven_steps, str(tmp_path), None, None, sizes[full_at] - 1) == 1
    stderr = (tmp_path / "stderr").read_text()
    assert f"OSError: {tmp_path}/checkpoint-4 could not be written (" in stderr
    assert "earlier checkpoints are complete: free some space, then train(resume_from_checkpoint=True)" in stderr
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(seven_steps, str(tmp_path)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", "2"]
    assert saved(tmp_path / "final") == saved(reference / "final")
