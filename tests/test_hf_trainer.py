"""examples/hf_trainer.py in small, and what examples/parts/trainer.py promises of the real Trainer."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import hf_trainer
import numpy as np
import pytest
import torch
from families import build
from parts import evaluation, models, text
from parts.trainer import newest_whole
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from trainer_processes import make, pair, rows, script, seven_steps, two_steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


@pytest.fixture(scope="module")
def start():
    """Starts a real process that has everything imported: `start(target, *args)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

        def started(target, *args):
            process = context.Process(target=target, args=args)
            process.start()
            return process

        yield started


@pytest.fixture(scope="module")
def run(start):
    """Runs such a process to its end; its exit code."""

    def ran(target, *args):
        process = start(target, *args)
        process.join()
        return process.exitcode

    return ran


# --- the loss of one step ------------------------------------------------------------------------


class Strict(GPT2LMHeadModel):
    """A student whose forward takes no further arguments, such as num_items_in_batch."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


def trained(student, distill):
    return [p.detach().clone() for p in [*student.parameters(), *distill.criterion.parameters()]]


def exact(kind):
    """A student and its distiller in float64, so that rounding hides nothing."""
    student, distill = pair("llama" if kind == "llama" else "gpt2")
    if kind == "strict":
        student.__class__ = Strict
    for model in (student, distill.criterion, *distill._teachers):
        model.double()
    return student, distill


def two_plain_steps(student, distill, clip):
    """What two steps on one big batch come to without any Trainer: the change of each weight."""
    parameters = [*student.parameters(), *distill.criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    big = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    before = trained(student, distill)
    for _ in range(2):
        distill(student, **big).loss.backward()
        if clip:
            clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return changes(before, trained(student, distill))


def changes(before, after):
    return [a - b for a, b in zip(after, before, strict=True)]


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert other.norm() > 0


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("kind", "clip"), [("gpt2", 0.0), ("gpt2", 0.5), ("llama", 0.0), ("strict", 0.0)])
def test_accumulated_micro_batches_take_the_steps_of_one_big_batch(kind, clip, micro_batches, tmp_path):
    expected = two_plain_steps(*exact(kind), clip)
    student, distill = exact(kind)
    before = trained(student, distill)
    make(
        tmp_path, student, distill, max_grad_norm=clip,
        per_device_train_batch_size=4 // micro_batches, gradient_accumulation_steps=micro_batches,
    ).train()  # fmt: skip
    assert_near(changes(before, trained(student, distill)), expected)


def test_two_processes_with_accumulation_take_the_steps_of_one_big_batch(start, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [start(two_steps_of, rank, port, str(tmp_path)) for rank in (0, 1)]
    student, distill = exact("gpt2")
    before = trained(student, distill)
    expected = two_plain_steps(student, distill, clip=0.5)
    for process in both:
        process.join()
    (first, loss), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert_near(changes(before, first), expected)
    student.eval()
    alone = [student(**{name: x[None] for name, x in row.items()}).loss.item() for row in rows()]
    assert loss == pytest.approx(sum(alone) / 4, rel=1e-5)
    checkpoint = tmp_path / "checkpoint-2"
    projections = load_file(checkpoint / "criterion.safetensors").values()
    assert all(map(torch.equal, projections, first[-len(projections) :]))
    files = {file.name for file in checkpoint.iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files


def test_without_labels_micro_batches_are_averaged(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]  # all as long: means of means are right

    def step(size, micro_batches):
        student, distill = pair(criterion=kdloss.FeatureKD(alpha=0.0))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        make(tmp_path, student, distill, data, ddp_find_unused_parameters=False, **settings).train()
        return trained(student, distill)

    for one, many in zip(step(4, 1), step(1, 4), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def test_labels_that_are_all_ignored_change_nothing(tmp_path):
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows()]
    student, distill = pair()
    before = trained(student, distill)
    make(tmp_path, student, distill, data).train()
    assert all(map(torch.equal, trained(student, distill), before))


def test_bf16_is_near_fp32_and_covers_the_teacher_but_no_weight(tmp_path):
    def step(**settings):
        student, distill = pair()
        before, seen = trained(student, distill), []
        (teacher,) = distill._teachers
        teacher.transformer.h[0].mlp.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        make(tmp_path, student, distill, max_steps=1, **settings).train()
        after = trained(student, distill)
        assert all(p.dtype == torch.float32 for p in after)
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]), set(seen)

    (exact, in_full), (near, in_half) = step(), step(bf16=True)
    assert (in_full, in_half) == ({torch.float32}, {torch.bfloat16})
    assert near.isfinite().all()
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def test_several_gpus_in_one_process_are_refused(tmp_path):
    student, distill = pair()
    arguments = make(tmp_path, student, distill).args
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        hf_trainer.DistillationTrainer(student, arguments, distill=distill)


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "strict", "llama"])
def test_evaluation_is_the_students_own_and_gathers_no_hidden_states(kind, tmp_path):
    student, distill = exact(kind)
    student.config.output_hidden_states = True
    gathered = []
    data = rows()[:1] * 3
    trainer = make(tmp_path, student, distill, data)
    trainer.compute_metrics = lambda found: gathered.append(found.predictions) or {}
    distill._run = None  # neither teacher nor capture
    loss = trainer.evaluate()["eval_loss"]
    inputs = {name: x[None] for name, x in data[0].items()}
    assert loss == pytest.approx(student.eval()(**inputs).loss.item(), rel=1e-5)
    (logits,) = gathered
    assert logits.shape == (3, 8, 61)
    trainer.compute_metrics = None
    assert trainer.predict(data).predictions.shape == logits.shape


# --- checkpoints ---------------------------------------------------------------------------------


def tensors_of(folder):
    """Every tensor in every file of a folder, by name."""
    found = {}

    def collect(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
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
    return found


def test_a_checkpoint_holds_student_and_projections_and_no_teacher(tmp_path):
    student, distill = pair()
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    make(tmp_path, student, distill, max_steps=1, **saving).train()
    checkpoint = tmp_path / "checkpoint-1"
    found = tensors_of(checkpoint)
    projections = distill.criterion.state_dict()
    for name, value in projections.items():
        assert torch.equal(found.pop(f"criterion.safetensors/{name}"), value)
    own = {name: p for name, p in student.state_dict().items() if name != "lm_head.weight"}  # tied
    for name, value in own.items():
        assert torch.equal(found.pop(f"model.safetensors/{name}"), value)
    # What is left: two moments and a counter for each weight, and states of random generators.
    shapes = sorted(tuple(x.shape) for n, x in found.items() if n.startswith("optimizer") and x.ndim)
    weights = [*student.parameters(), *projections.values()]
    assert shapes == sorted(tuple(p.shape) for p in weights for _ in range(2))
    rest = [x for n, x in found.items() if not n.startswith("optimizer")]
    assert all(x.dtype in (torch.uint8, torch.int64) for x in rest)
    (teacher,) = distill._teachers
    values = {p.flatten()[:3].sum().item() for p in teacher.parameters() if p.std() > 0}
    assert not any(x.flatten()[:3].sum().item() in values for x in tensors_of(checkpoint).values())
    assert (
        sum(f.stat().st_size for f in checkpoint.iterdir())
        < 3.3 * 4 * sum(p.numel() for p in weights) + 4e4
    )


@pytest.mark.parametrize("criterion", [kdloss.VanillaKD, lambda: kdloss.FeatureKD(logit_weight=1.0)])
def test_resumed_training_ends_with_the_same_weights(criterion, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}

    def go(**settings):
        student, distill = pair(criterion=criterion(), dropout=0.1)
        trainer = make(tmp_path, student, distill, max_steps=5, per_device_train_batch_size=2, **saving)
        trainer.train(**settings)
        return trained(student, distill)

    whole = go()
    file = tmp_path / "checkpoint-2/criterion.safetensors"
    assert file.is_file() == (criterion is not kdloss.VanillaKD)
    shutil.rmtree(tmp_path / "checkpoint-5")
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        assert all(map(torch.equal, go(resume_from_checkpoint=checkpoint), whole))
    assert all(map(torch.equal, go(resume_from_checkpoint=True), whole))  # nothing left to do


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_a_lora_students_projections_train_and_its_base_does_not(tmp_path):
    from peft import LoraConfig, get_peft_model

    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}

    def go(**settings):
        student, distill = pair("llama", dropout=0.1)
        torch.manual_seed(3)
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
        names = [n for n, _ in student.named_parameters()]
        before = trained(student, distill)
        make(tmp_path, student, distill, max_steps=4, per_device_train_batch_size=2, **saving).train(
            **settings
        )
        return names, before, trained(student, distill)

    names, before, after = go()
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        learns = i >= len(names) or "lora_" in names[i]
        assert torch.equal(a, b) != learns
    checkpoint = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "criterion.safetensors"} <= {f.name for f in checkpoint.iterdir()}
    assert not any("layer_norm" in name or ".base_layer" in name for name in tensors_of(checkpoint))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert all(map(torch.equal, go(resume_from_checkpoint=str(checkpoint))[-1], after))


# --- killed processes, full disks ----------------------------------------------------------------


def saved(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The folder of a run that nothing happened to, and the calls that writing a checkpoint took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(seven_steps, str(folder), "save") == 0
    return folder, int((folder / "calls").read_text())


@pytest.mark.parametrize(
    ("where", "at", "goes_on_from"),
    [
        ("step", 300, 4),
        *(("save", part, 2) for part in (0.0, 0.1, 0.3, 0.5, 0.7)),
        ("state", None, 2),
        ("save", 1.0, 4),
        ("end", 1, 7),
        ("end", 0.05, 7),
    ],
)
def test_killed_anywhere_it_goes_on_and_ends_the_same(where, at, goes_on_from, run, undisturbed, tmp_path):
    reference, calls = undisturbed
    at = max(1, int(at * (calls - 20))) if isinstance(at, float) else at
    assert run(seven_steps, str(tmp_path), where, at) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert run(seven_steps, str(tmp_path)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", str(goes_on_from)]
    assert saved(tmp_path / "final") == saved(reference / "final")
    assert set(saved(tmp_path / "final")) == {"model.safetensors", "criterion.safetensors"}
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (tmp_path / "final.partial").exists()
