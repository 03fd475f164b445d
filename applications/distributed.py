"""Distil a causal language model on several GPUs or machines: torchrun with DDP, or FSDP2 by --fsdp.

Trains the same student twice, without and with distillation, and prints both perplexities on
held-out text. A batch is that of all processes together, so their number changes no result. After
an interruption the same command goes on from the last complete checkpoint:

    torchrun --nproc-per-node 2 applications/distributed.py            # DDP: everything on every rank
    torchrun --nproc-per-node 2 applications/distributed.py --fsdp     # student and teacher in shards
    python applications/distributed.py                                 # one process
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import distill_lm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parts import options, scale
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings(scale.Settings):
    """Those of both scripts, and how to spread."""

    fsdp: Annotated[bool, Doc("shard student and teacher, not DDP")] = False


DEFAULTS = Settings(output=Path("runs/distributed"))


def shard(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Each block on its own, so that one at a time is whole, then the rest of the model."""
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


class State(Stateful):
    """All that a checkpoint holds; `dcp` asks for it and gives it back, whatever the sharding."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
        self.module, self.optimizer, self.schedule = module, optimizer, schedule
        self.curve: scale.Curve = []

    def state_dict(self) -> dict[str, object]:
        """Shards of tensors, and a few numbers."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        numbers = {"schedule": self.schedule.state_dict(), "curve": json.dumps(self.curve)}
        return {"model": model, "optimizer": optimizer, **numbers}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Everything as it was."""
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.module, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.curve = json.loads(state["curve"])


def complete(folder: Path) -> list[Path]:
    """Checkpoints from old to new. `.metadata` is written last: without it one is not whole."""
    return sorted(found.parent for found in folder.glob("step-*/.metadata"))


def save(state: State, folder: Path, step: int) -> None:
    """Write a checkpoint, then remove all but the newest two."""
    checkpoint = folder / f"step-{step:08d}"
    with scale.writing(checkpoint):
        dcp.save({"state": state}, checkpoint_id=checkpoint)
    if dist.get_rank() == 0:
        for old in {*folder.glob("step-*")} - {*complete(folder)[-2:]}:
            (old / ".metadata").unlink(missing_ok=True)  # first, so that half of one is never taken for one
            shutil.rmtree(old)


def batches(blocks: Tensor, args: Settings, skip: int) -> Iterator[dict[str, Tensor]]:
    """The share that this rank has of every batch, without end, after those of the steps that are done."""
    sampler: DistributedSampler = DistributedSampler(blocks, seed=args.seed, drop_last=True)
    loader = DataLoader(blocks, args.batch_size // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in count(skip // len(loader)):
        sampler.set_epoch(epoch)
        for tokens in islice(loader, skip % len(loader), None):
            yield {"input_ids": tokens, "labels": tokens}
        skip = 0


@torch.no_grad()
def perplexity(module: nn.Module, heldout: Tensor, args: Settings) -> float:
    """The student's on held-out blocks, every rank computing its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    module.eval()
    shares = heldout[rank::world].split(args.batch_size // world)
    loss = torch.stack([module(input_ids=share, labels=share).loss for share in shares]).mean()
    module.train()
    dist.all_reduce(loss)
    return math.exp(loss.item() / world)


def train(
    name: str,
    criterion: nn.Module,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor,
    heldout: Tensor,
    args: Settings,
) -> scale.Curve:
    """Train one student, or go on with it, and save it whole; its held-out perplexity over steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    student = scale.student_of(args, teacher, tokenizer)
    module: nn.Module = kdloss.Distillation(student, teacher, criterion).to(blocks.device)
    blocks_of = kdloss.layers.find_blocks(student)
    module = shard(module, blocks_of) if args.fsdp else DistributedDataParallel(module)
    optimizer = AdamW(module.parameters(), args.lr)  # after sharding; projections are among them
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    state, checkpoints = State(module, optimizer, schedule), args.output / "checkpoints" / name
    if found := complete(checkpoints):
        dcp.load({"state": state}, checkpoint_id=found[-1])
    done = schedule.last_epoch
    stream = batches(blocks, args, skip=done)
    bar = tqdm(total=args.steps, initial=done, desc=name, unit="step", disable=rank > 0)
    module.train()
    for step in range(done + 1, args.steps + 1):
        batch = next(stream)
        torch.manual_seed(hash((args.seed, step, rank)))  # dropout repeats itself after an interruption
        # DDP and FSDP average gradients over ranks, which may count different numbers of labels:
        # divided by all ranks' labels over the number of ranks, they are those of one process.
        items = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(items)
        module(**batch, num_items_in_batch=items / world).loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        if step % args.every == 0 or step == args.steps:
            state.curve.append((step, perplexity(module, heldout, args)))
            bar.set_postfix(held_out=f"{state.curve[-1][1]:.1f}")
            save(state, checkpoints, step)
    bar.close()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(module, options=options)  # every rank takes part, the first gets all
    if rank == 0:
        scale.save(student, weights, tokenizer, args.output / name)
    return state.curve


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Join the other processes, prepare text and teacher, train two students, report."""
    args = options.read(DEFAULTS, arguments, __doc__)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **alone)
    try:
        first = dist.get_rank() == 0
        found = scale.prepare(args, dist.get_world_size(), first, dist.barrier, distill_lm.train)
        teacher, tokenizer, blocks, heldout = found
        if args.fsdp:  # moves a block to the GPU when it is sharded: the whole never has to fit there
            shard(teacher, kdloss.layers.find_blocks(teacher))
        else:
            teacher.to(device)
        data = (blocks.to(device), heldout.to(device))
        curves = {
            name: train(name, criterion, teacher, tokenizer, *data, args)
            for name, criterion in scale.criteria(args).items()
        }
        return scale.write(curves, args) if first else {}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
