"""What the child processes of test_hf_trainer.py run; apart, so that they can import it."""

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import hf_trainer
import torch
from families import batch, build
from leaving import leave
from parts.files import replacing
from parts.trainer import DistillationTrainer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import kdloss


def rows():
    """Four examples with 7, 1, 7 and 4 labels that a causal model predicts."""
    both = batch("gpt2")
    found = [{name: x[i].clone() for name, x in both.items()} for i in (0, 1, 0, 1)]
    found[1]["labels"][2:] = -100
    for row in found[2:]:
        row["input_ids"] = row["input_ids"].flip(0)
        row["labels"] = row["input_ids"].masked_fill(row["labels"] == -100, -100)
    return found


def make(folder, student, distill, data=None, **settings):
    """A trainer that takes plain gradient steps and saves nothing, unless told otherwise."""
    plain = {
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(plain | settings))
    data = data or rows()
    return DistillationTrainer(student, arguments, distill=distill, train_dataset=data, eval_dataset=data)


def pair(family="gpt2", seed=0, criterion=None, dropout=0.0):
    """A student, and a distiller of a wider and deeper teacher with projections of this seed."""
    teacher, student = build(family, width=24, depth=4), build(family, depth=2, seed=1)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    criterion = criterion or kdloss.FeatureKD(logit_weight=1.0)
    torch.manual_seed(seed)
    return student, kdloss.Distiller(teacher, criterion).prepare(student)


def two_steps_of(rank, port, folder):
    """One of two processes, each with two micro-batches a step; its weights go into a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    student, distill = pair(seed=rank)  # unequal projections; rank 0's count
    for model in (student, distill.criterion, *(t.module for t in distill.teachers)):
        model.double()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    settings["per_device_eval_batch_size"] = 1
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(folder, student, distill, ddp_backend="gloo", **settings, **saving)
    if rank == 1:
        save = Trainer._save_rng_state
        Trainer._save_rng_state = lambda *args: time.sleep(0.5) or save(*args)
    trainer.train()
    weights = [p.detach() for p in [*student.parameters(), *distill.criterion.parameters()]]
    torch.save((weights, trainer.evaluate()["eval_loss"]), f"{folder}/{rank}.pt")
    leave()


class StartNoted(TrainerCallback):
    """Which step training begins at."""

    def on_train_begin(self, args, state, control, **_):
        with open(f"{args.output_dir}/starts", "a") as file:
            file.write(f"{state.global_step}\n")


class Noted(DistillationTrainer):
    """Notes which step it begins at."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.add_callback(StartNoted())


class DiskFull(TrainerCallback):
    """No file may grow beyond this size any more, from a step on."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """Kills its process at the n-th function call, C's included, inside a `with`; counts them."""

    def __init__(self, at=None):
        self.calls, self.at = 0, at

    def __enter__(self):
        sys.setprofile(self.count)

    def __exit__(self, *_):
        sys.setprofile(None)

    def count(self, frame, event, arg):
        self.calls += event in ("call", "c_call")
        if self.calls == self.at:
            die()


def save_half(state, path):
    """A TrainerState that dies while it is written, at step 4."""
    if state.global_step != 4:
        return save_to_json(state, path)
    whole_text = Path(path).with_name("whole")
    save_to_json(state, whole_text)
    text = whole_text.read_text()
    whole_text.unlink()
    Path(path).write_text(text[: len(text) // 2])
    die()


save_to_json = TrainerState.save_to_json


def seven_steps(folder, where=None, at=None, full=None):
    """Train to step 7, a checkpoint each 2, from whatever is in the folder; the end is `folder/final`.

    The process dies `where` it is told, at its `at`-th call: in "step", "save", "state" (half-written)
    or "rotation" (half-removed) at step 4, or at the "end". Or the disk is `full` at a size.
    """
    torch.set_num_threads(1)
    os.makedirs(folder, exist_ok=True)
    sys.stderr = open(f"{folder}/stderr", "w")  # noqa: SIM115
    student, distill = pair(dropout=0.1)
    data = [row for _ in range(3) for row in rows()]  # 4 steps an epoch
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps"}
    trainer = make(
        folder, student, distill, data, max_steps=7, per_device_train_batch_size=3, optim="adamw_torch",
        learning_rate=1e-2, eval_steps=2, **saving,
    )  # fmt: skip
    trainer.add_callback(StartNoted())
    if full is not None:
        trainer.add_callback(DiskFull(3, full))
    mortal = Mortal(at)

    def watched(function, condition):
        def call(*args, **settings):
            if not condition():
                return function(*args, **settings)
            with mortal:
                return function(*args, **settings)

        return call

    def at_step(step):
        return lambda: trainer.state.global_step == step

    if where == "save":
        trainer._save_checkpoint = watched(trainer._save_checkpoint, at_step(4))
    if where == "step":
        trainer.training_step = watched(trainer.training_step, at_step(4))
    if where == "rotation":

        def half_removed(checkpoint, ignore_errors):
            Path(checkpoint, "model.safetensors").unlink()
            die()

        shutil.rmtree = half_removed  # what removes checkpoint-2 when checkpoint-4 is there
    if where == "state":
        TrainerState.save_to_json = save_half
    try:
        trainer.train(resume_from_checkpoint=True)

        def finish():
            with replacing(Path(folder, "final")) as partial:
                trainer.save_model(partial)

        watched(finish, lambda: where == "end")()
    except OSError:
        traceback.print_exc()
        sys.exit(1)
    Path(folder, "calls").write_text(str(mortal.calls))


def script(argv, full=None):
    """The example as a command; its last words go to stderr in the output folder's parent."""
    torch.set_num_threads(1)
    output = Path(argv[argv.index("--output") + 1])
    sys.stderr = open(output.with_suffix(".stderr"), "w")  # noqa: SIM115
    if full is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    hf_trainer.DistillationTrainer = Noted
    hf_trainer.main(argv)
