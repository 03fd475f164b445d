"""Distillation in each of two gloo processes: torchrun --nproc-per-node 2 tests/distillation_processes.py OUTPUT.

The same functions, called in one process, give the results that the two processes must reach.
"""

import copy
import itertools
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from families import VOCAB, build
from leaving import leave
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import kdloss

BATCH = 4
LINEAR = kdloss.schedules.linear


def rows(steps=4):
    """Return padded examples for so many batches, with equally many labels, so a mean of means is the mean."""
    tokens = torch.randint(3, VOCAB, (steps * BATCH, 8), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(tokens)
    attention[:, 6:] = 0
    labels = tokens.masked_fill(attention == 0, -100)
    labels[:, 0] = -100  # the first token is not predicted
    return [
        {"input_ids": t, "attention_mask": a, "labels": y} for t, a, y in zip(tokens, attention, labels, strict=True)
    ]


def recipe():
    return kdloss.FeatureKD("all", pairing="first", logit_weight=1.0)


def switched_off():
    """Give the term with the projections the weight 0."""
    return kdloss.CrossEntropy() + 0.0 * kdloss.Features("all", pairing="first")


def turned_on():
    """Add features from the second step on, while the weight and temperature of the logits decrease."""
    logits = LINEAR(1.0, 0.0, steps=2) * kdloss.Logits(temperature=LINEAR(4.0, 1.0, steps=4))
    features = LINEAR(0.0, 1.0, steps=3) * kdloss.Features("all", pairing="first")
    return 0.3 * kdloss.CrossEntropy() + logits + features


CRITERIA = {"recipe": recipe, "switched off": switched_off, "turned on": turned_on}


def made(criterion=recipe):
    """Return a distillation of a wide, deep teacher into a small student, with projections."""
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    torch.manual_seed(0)
    return kdloss.Distillation(student, teacher, criterion())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model):
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def gradients(model):
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def plain(criterion=recipe, wrap=lambda model: model, epochs=1):
    """Run README's loop in plain torch; return the logits and gradients of every step, and the final weights."""
    model = made(criterion)
    wrapped = wrap(model)
    optimizer = sgd(wrapped)
    share = BATCH // world()
    loader = DataLoader(rows(), BATCH)
    found, logits = [], []
    for batch in itertools.chain.from_iterable(loader for _ in range(epochs)):
        mine = {name: x[rank() * share : (rank() + 1) * share] for name, x in batch.items()}
        outputs = wrapped(**mine)
        logits.append(outputs.logits.detach().clone())
        outputs.loss.backward()
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        model.criterion.advance()
    return {"logits": logits, "gradients": found, "weights": weights(model)}


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def sharded(model, whole_only=False):
    """Apply FSDP2 to the student's blocks and the whole module, or only to the whole module."""
    from torch.distributed.fsdp import fully_shard  # since torch 2.6

    for block in () if whole_only else kdloss.layers.find_blocks(model.student):
        fully_shard(block)
    return fully_shard(model)


def accelerated(folder, criterion=recipe, accumulate=1, resume=None, precision="no", steps=4):
    """Run README's loop under Accelerate, and save before the last step or resume from there."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model = made(criterion)
    criterion = model.criterion
    size = BATCH // world() // accumulate
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(rows(steps), size))
    step, last, losses = 0, (steps - 1) * accumulate, []
    if resume is not None:
        accelerator.load_state(str(resume))
        loader, step = accelerator.skip_first_batches(loader, last), last
    for batch in loader:
        if step == last and resume is None:
            accelerator.save_state(str(folder))
        with accelerator.accumulate(model):
            outputs = model(**batch)
            accelerator.backward(outputs.loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                criterion.advance()
        losses.append(outputs["loss"].item())
        step += 1
    kinds = {name: str(outputs[name].dtype) for name in ("loss", "logits")}
    return {"weights": weights(model), "step": criterion.step, "kinds": kinds, "losses": losses}


def kept_apart(sharding=True):
    """Load the distributed state dict of a trained module into a fresh one, and train both on."""
    full = dcp.StateDictOptions(full_state_dict=True)
    model, other = (sharded(made(turned_on)) if sharding else made(turned_on) for _ in range(2))
    optimizers = sgd(model), sgd(other)
    batches = [{name: x[rank() :: world()] for name, x in batch.items()} for batch in DataLoader(rows(), BATCH)]

    def step(one, optimizer, batch):
        one(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        one.criterion.advance()

    for batch in batches[:2]:
        step(model, optimizers[0], batch)
    for options in (None, full):
        taken = copy.deepcopy(dcp.get_state_dict(model, optimizers[0], options=options))
        dcp.set_state_dict(other, optimizers[1], model_state_dict=taken[0], optim_state_dict=taken[1], options=options)
    keys = sorted(taken[0])
    for batch in batches[2:]:
        step(model, optimizers[0], batch)
        step(other, optimizers[1], batch)
    return {"weights": weights(model), "resumed": weights(other), "step": other.criterion.step, "keys": keys}


def main(folder):
    from lightning_runs import lightened  # imported here, because it imports this module

    dist.init_process_group("gloo")
    found = {f"ddp, {name}": plain(criterion, DistributedDataParallel) for name, criterion in CRITERIA.items()}
    found["fsdp of blocks"] = plain(wrap=sharded)
    found["fsdp of the whole"] = plain(turned_on, wrap=lambda model: sharded(model, whole_only=True))
    found["checkpoint"] = kept_apart()
    for name, criterion in CRITERIA.items():
        for accumulate in (1, 2):
            key = f"accelerate, {name}, {accumulate}"
            found[key] = accelerated(folder / key, criterion, accumulate)
            found[f"{key}, resumed"] = accelerated(None, criterion, accumulate, resume=folder / key)
    for name in ("recipe", "turned on"):
        key = f"lightning, {name}"
        found[key] = lightened(folder / key, CRITERIA[name])
        found[f"{key}, resumed"] = lightened(folder / key, CRITERIA[name], resume=folder / key / "epoch=0.ckpt")
    torch.save(found, folder / f"{rank()}.pt")
    leave()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
