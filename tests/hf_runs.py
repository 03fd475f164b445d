"""Small runs of the Trainer, in this process and in child processes, which import this module."""

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from families import batch, build
from leaving import leave
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

import kdloss
from kdloss.hf import DistillationTrainer


def rows():
    """Four examples with 7, 1, 7 and 4 labels that a causal model predicts."""
    two = batch("gpt2")
    examples = [{name: x[i].clone() for name, x in two.items()} for i in (0, 1, 0, 1)]
    examples[1]["labels"][2:] = -100
    for row in examples[2:]:
        row["input_ids"] = row["input_ids"].flip(0)
        row["labels"] = row["input_ids"].masked_fill(row["labels"] == -100, -100)
    return examples


PLAIN = {
    "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "dataloader_pin_memory": False, "use_cpu": True,
}  # fmt: skip


def make(folder, student, teacher, criterion, data=None, *, of=DistillationTrainer, distilling=None, **settings):
    """A trainer that takes plain gradient steps and saves nothing, unless `settings` change that.

    It divides by the number of labels that the student predicts, unless `distilling` changes `count`.
    """
    arguments = TrainingArguments(str(folder), **(PLAIN | settings))
    data = data or rows()
    distillation = {"teacher": teacher, "criterion": criterion, "count": "student"} | (distilling or {})
    return of(student, arguments, train_dataset=data, eval_dataset=data, **distillation)


def pair(family="gpt2", criterion=None, dropout=0.0):
    """A student, a wider and deeper teacher, and a criterion with trained projections."""
    teacher, student = build(family, width=24, depth=4), build(family, depth=2, seed=1)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return student, teacher, criterion or kdloss.FeatureKD(logit_weight=1.0)


def trained(student, criterion):
    return [p.detach().clone() for p in [*student.parameters(), *criterion.parameters()]]


def two_steps_of(rank, port, folder):
    """Train in one of two processes with two micro-batches per step, and write the weights to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    student, teacher, criterion = pair()
    student.double(), teacher.double()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    settings |= {"per_device_eval_batch_size": 1, "logging_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(folder, student, teacher, criterion, ddp_backend="gloo", **settings, **saving)
    criterion.double()
    for p in criterion.parameters():
        p.data.fill_(0.1 + rank)  # training starts from rank 0's values
    if rank == 1:
        save = Trainer._save_rng_state
        Trainer._save_rng_state = lambda *args: time.sleep(0.5) or save(*args)
    trainer.train()
    weights = [p.detach() for p in [*student.parameters(), *criterion.parameters()]]
    torch.save((weights, trainer.evaluate(), trainer.state.log_history), f"{folder}/{rank}.pt")
    leave()


def as_the_trainer(rank, port, folder):
    """In one of two processes, train without a teacher, then with a negligible weight of one; save the changes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    changes = {}
    for family, of in {"gpt2": GPT2LMHeadModel, "strict": Strict, "ignoring": Ignoring}.items():
        for kind in ("stock", "near"):
            student, teacher, _ = pair("gpt2")
            student.__class__ = of
            if (family, kind) == ("ignoring", "stock"):
                student.accepts_loss_kwargs = False  # the Trainer can't know it
            before = [p.detach().clone() for p in student.parameters()]
            settings = PLAIN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
            arguments = TrainingArguments(f"{folder}/{rank}", ddp_backend="gloo", **settings)
            near = {"teacher": teacher, "criterion": kdloss.VanillaKD(alpha=1 - 1e-9)}
            trainer = Trainer if kind == "stock" else partial(DistillationTrainer, **near)
            run = trainer(student, arguments, train_dataset=rows(), eval_dataset=rows())
            evaluated, done = run.evaluate()["eval_loss"], run.train()
            change = torch.cat([(p.detach() - b).flatten() for p, b in zip(student.parameters(), before, strict=True)])
            changes[family, kind] = (change, done.training_loss, evaluated)
    torch.save(changes, f"{folder}/{rank}.pt")
    leave()


class Strict(GPT2LMHeadModel):
    """A student whose forward takes no other arguments, such as num_items_in_batch."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


class Ignoring(GPT2LMHeadModel):
    """A student whose forward takes num_items_in_batch and ignores it, as BERT's and T5's do in transformers 5."""

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


class RecordsStart(TrainerCallback):
    """Append the step at which training begins to a file."""

    def on_train_begin(self, args, state, control, **_):
        with open(f"{args.output_dir}/starts", "a") as file:
            file.write(f"{state.global_step}\n")


class DiskFull(TrainerCallback):
    """From a step on, no file may grow beyond a size."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAtCall:
    """Count the function calls inside a `with`, those of C functions included, and kill the process at the n-th."""

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
    """Save a TrainerState, but at step 4 write only half of it and kill the process."""
    if state.global_step != 4:
        return save_to_json(state, path)
    full_text = Path(path).with_name("whole")
    save_to_json(state, full_text)
    text = full_text.read_text()
    full_text.unlink()
    Path(path).write_text(text[: len(text) // 2])
    die()


save_to_json = TrainerState.save_to_json


def seven_steps(folder, where=None, at=None, full=None):
    """Train to step 7 with a checkpoint every 2 steps, resumed from what is in the folder, and save `folder/final`.

    The process is killed in `where`, at its `at`-th function call: in "step", "save", "state" (half-written) or
    "rotation" (half-removed) at step 4, or at the "end". With `full`, no file may grow beyond that size after step 3.
    """
    torch.set_num_threads(1)
    os.makedirs(folder, exist_ok=True)
    sys.stderr = open(f"{folder}/stderr", "w")  # noqa: SIM115
    student, teacher, criterion = pair(dropout=0.1)
    data = [row for _ in range(3) for row in rows()]  # 4 steps per epoch
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "eval_strategy": "steps"}
    trainer = make(
        folder, student, teacher, criterion, data, max_steps=7, per_device_train_batch_size=3, optim="adamw_torch",
        learning_rate=1e-2, eval_steps=2, **saving,
    )  # fmt: skip
    trainer.add_callback(RecordsStart())
    if full is not None:
        trainer.add_callback(DiskFull(3, full))
    killed_at_call = KilledAtCall(at)

    def killable(function, condition):
        def call(*args, **settings):
            if not condition():
                return function(*args, **settings)
            with killed_at_call:
                return function(*args, **settings)

        return call

    def at_step(step):
        return lambda: trainer.state.global_step == step

    if where == "save":
        trainer._save_checkpoint = killable(trainer._save_checkpoint, at_step(4))
    if where == "step":
        trainer.training_step = killable(trainer.training_step, at_step(4))
    if where == "rotation":

        def half_removed(checkpoint, ignore_errors):
            Path(checkpoint, "model.safetensors").unlink()
            die()

        shutil.rmtree = half_removed  # the Trainer's call that removes checkpoint-2 once checkpoint-4 exists
    if where == "state":
        TrainerState.save_to_json = save_half
    try:
        trainer.train(resume_from_checkpoint=True)

        def finish():
            trainer.save_model(f"{folder}/final")

        killable(finish, lambda: where == "end")()
    except OSError:
        traceback.print_exc()
        sys.exit(1)
    Path(folder, "calls").write_text(str(killed_at_call.calls))
