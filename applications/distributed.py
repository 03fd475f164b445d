"""Distil a causal language model on several GPUs or machines with Accelerate; FSDP2 with --fsdp.

The script trains the same student twice, without and with distillation, and prints both perplexities on held-out text.
--batch-size counts all processes and micro-batches together, so their number does not change the result. If the run is
interrupted, the same command resumes from the last complete checkpoint:

    torchrun --nproc-per-node 2 applications/distributed.py            # DDP: a full copy on every rank
    torchrun --nproc-per-node 2 applications/distributed.py --fsdp     # student and teacher sharded
    accelerate launch applications/distributed.py                      # as `accelerate config` says
    accelerate launch --config_file applications/deepspeed_zero3.yaml applications/distributed.py
    python applications/distributed.py                                 # one process
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import distill_lm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from parts import cells, files, options, scale, setup
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings(options.Distillation, options.Student, options.Teacher, options.Text):
    """Most settings of distill_lm.py, and how to distribute the training."""

    steps: Annotated[int, options.COUNT, Doc("optimizer steps of a student")] = 200
    every: Annotated[int, options.COUNT, Doc("evaluate and save after this many steps")] = 50
    batch_size: Annotated[int, options.COUNT, Doc("blocks per step, over all processes and micro-batches")] = 8
    lr: Annotated[float, Doc("learning rate")] = 2e-3
    seed: Annotated[int, Doc("seed of the student and of the order of batches")] = 0
    output: Annotated[Path, Doc("folder of results; all machines share it and --teachers")] = Path("runs/distributed")
    fsdp: Annotated[bool, Doc("shard student and teacher, in place of DDP or Accelerate's configuration")] = False
    accumulate: Annotated[int, options.COUNT, Doc("micro-batches per step")] = 1


DEFAULTS = Settings(
    method="both", samples=2000, student_samples=1800, teacher_lr=2e-3, student_width=64, student_heads=4
)


def plain(args: Settings) -> distill_lm.Settings:
    """The settings of distill_lm.py for one process, which makes text and models."""
    return options.some(distill_lm.Settings, args, device="cpu")


def shard(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Shard each block on its own, so that only one at a time is gathered, then the rest of the model."""
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


@dataclass
class Shards(Stateful):
    """The state that `dcp` saves and loads for a sharded run."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler

    def state_dict(self) -> dict[str, Any]:
        """The sharded tensors, and the state of the schedule."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything."""
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.module, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.schedule.load_state_dict(state["schedule"])


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints from old to new. A checkpoint gets its name only when it is complete."""
    return sorted(folder.glob("step-????????"))


def save(accelerator: Accelerator, shards: Shards | None, curve: scale.Curve, folder: Path) -> None:
    """Write a checkpoint under a temporary name, rename it, then remove all but the newest two."""
    partial = folder.with_name("partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with scale.writing(partial):
        if shards is not None:
            dcp.save({"state": shards}, checkpoint_id=partial)
        else:
            accelerator.save_state(str(partial), safe_serialization=False)  # safetensors warns about tied weights
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
        partial.rename(folder)
        for old in complete(folder.parent)[:-2]:
            shutil.rmtree(old.rename(partial))  # renamed first: a half-removed folder is no checkpoint
    accelerator.wait_for_everyone()


def batches(
    loader: DataLoader, accelerator: Accelerator, accumulate: int, skip: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield the micro-batches of every step after the first `skip`, without end; this process gets a share of each."""
    steps = len(loader) // accumulate  # per epoch; a remainder that does not fill a step is dropped
    for epoch in count(skip // steps):
        loader.set_epoch(epoch)
        micro_batches = iter(accelerator.skip_first_batches(loader, skip % steps * accumulate))
        for _ in range(skip % steps, steps):
            yield [{"input_ids": x, "labels": x} for x in islice(micro_batches, accumulate)]
        skip = 0


@torch.no_grad()
def perplexity(accelerator: Accelerator, module: nn.Module, heldout: Tensor, args: Settings) -> float:
    """The student's perplexity on held-out blocks. Every process computes its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    module.eval()
    shares = heldout[rank::world].split(args.batch_size // world)
    loss = torch.stack([module(input_ids=share, labels=share).loss for share in shares]).mean()
    module.train()
    return math.exp(accelerator.reduce(loss, "mean").item())


def train(name: str, args: Settings, made: setup.Setup, accelerator: Accelerator) -> scale.Curve:
    """Train one student, or resume it, and save it unsharded; return its held-out perplexity by step."""
    student = setup.student_of(plain(args), made.teacher, made.tokenizer)  # seeds the projections, too
    module: nn.Module = kdloss.Distillation(student, made.teacher, distill_lm.criterion_for(plain(args)))
    if args.fsdp:
        module = shard(module.to(accelerator.device), kdloss.layers.find_blocks(student))
    optimizer = AdamW(module.parameters(), args.lr)  # after sharding; with the projections
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    loader = DataLoader(made.blocks, args.batch_size // args.accumulate, shuffle=True, drop_last=True)
    shards = Shards(module, optimizer, schedule) if args.fsdp else None
    if shards is not None:
        loader = accelerator.prepare(loader)
    else:
        module, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    checkpoints, curve, done = args.output / "checkpoints" / name, [], 0
    if found := complete(checkpoints):
        if shards is not None:
            dcp.load({"state": shards}, checkpoint_id=found[-1])
        else:
            accelerator.load_state(str(found[-1]))
        curve = json.loads((found[-1] / "curve.json").read_text(encoding="utf-8"))
        done = curve[-1][0]
    stream = batches(loader, accelerator, args.accumulate, skip=done)
    show = accelerator.is_local_main_process
    bar = tqdm(total=args.steps, initial=done, desc=name, unit="step", disable=not show)
    module.train()
    for step in range(done + 1, args.steps + 1):
        micro_batches = next(stream)
        # After an interruption, dropout is the same as without it.
        torch.manual_seed(hash((args.seed, step, accelerator.process_index)))
        # Gradients are averaged over processes and micro-batches, which may hold different numbers of labels. Each loss
        # is divided by the average number of labels, so the averaged gradient is that of one large batch.
        items = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]).sum()
        items = accelerator.reduce(items, "sum") / (accelerator.num_processes * args.accumulate)
        for batch in micro_batches:
            with accelerator.accumulate(module):
                accelerator.backward(module(**batch, num_items_in_batch=items).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(module.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        bar.update()
        if step % args.every == 0 or step == args.steps:
            curve.append((step, perplexity(accelerator, module, made.heldout, args)))
            bar.set_postfix(held_out=f"{curve[-1][1]:.1f}")
            save(accelerator, shards, curve, checkpoints / f"step-{step:08d}")
    bar.close()
    if shards is not None:
        weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = accelerator.get_state_dict(module)  # all processes take part; the first one gets all weights
    if accelerator.is_main_process:
        scale.save(student, weights, made.tokenizer, args.output / name)
    accelerator.free_memory()
    return curve


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prepare text and teacher, train two students, and write the results."""
    args = options.read(DEFAULTS, arguments, __doc__)
    cpu = not torch.accelerator.is_available()  # without it, processes without a GPU would train separately
    processes = PartialState(cpu=cpu)
    if args.fsdp and not dist.is_initialized():  # a single process, for which Accelerate makes no group
        dist.init_process_group("gloo" if cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Before the Accelerator is made: under ZeRO-3 it makes transformers load every model in shards. The engine
        # gathers the student's shards, but nothing would gather the teacher's.
        shares, first = processes.num_processes * args.accumulate, processes.is_main_process
        settings = {name: str(x) for name, x in vars(args).items() if name not in ("output", "teachers")}
        begun = cells.begun(args.output, settings)
        made = scale.prepare(plain(args), shares, first, processes.wait_for_everyone, distill_lm.train)
        if first and not begun:
            files.save_json(settings, args.output / "settings.json")
        accelerator = Accelerator(
            cpu=cpu,
            # A step always has all its micro-batches: the end of an epoch must not end it early.
            gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulate, sync_with_dataloader=False),
            dataloader_config=DataLoaderConfiguration(
                split_batches=True, use_seedable_sampler=True, data_seed=args.seed
            ),
        )
        if args.fsdp:  # moves one block at a time to the GPU, so the full model never has to fit there
            shard(made.teacher, kdloss.layers.find_blocks(made.teacher))
        else:
            made.teacher.to(accelerator.device)
        made.heldout = made.heldout.to(accelerator.device)
        methods = {"alone": "none", "distilled": args.method}
        curves = {name: train(name, replace(args, method=x), made, accelerator) for name, x in methods.items()}
        return scale.write(curves, settings, args.output) if first else {}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
