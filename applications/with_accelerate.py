"""Distil a causal language model with Hugging Face Accelerate, on whatever `accelerate launch` offers.

Trains the same student twice, without and with distillation, and prints both perplexities on
held-out text. A batch is that of all processes and micro-batches together, so their number changes
no result. After an interruption the same command goes on from the last complete checkpoint:

    accelerate launch applications/with_accelerate.py                                  # as configured
    accelerate launch --config_file applications/deepspeed_zero3.yaml applications/with_accelerate.py
    python applications/with_accelerate.py                                             # one process
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import distill_lm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from parts import options, scale
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup
from typing_extensions import Doc

import kdloss


@dataclass(kw_only=True)
class Settings(scale.Settings):
    """Those of both scripts, and how to accumulate."""

    accumulate: Annotated[int, options.COUNT, Doc("micro-batches of a step")] = 1


DEFAULTS = Settings(output=Path("runs/with_accelerate"))


def complete(folder: Path) -> list[Path]:
    """Checkpoints from old to new; one gets its name only when it is whole."""
    return sorted(folder.glob("step-????????"))


def save(accelerator: Accelerator, curve: scale.Curve, folder: Path) -> None:
    """Write a checkpoint under another name first, then remove all but the newest two."""
    partial = folder.with_name("partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with scale.writing(partial):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "curve.json").write_text(json.dumps(curve), encoding="utf-8")
        partial.rename(folder)
        for old in complete(folder.parent)[:-2]:
            shutil.rmtree(old.rename(partial))  # half of one is never taken for one
    accelerator.wait_for_everyone()


def batches(
    loader: DataLoader, accelerator: Accelerator, accumulate: int, skip: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Micro-batches of every step after the first `skip`, without end; this process has a share of each."""
    steps = len(loader) // accumulate  # of an epoch: what is left of it makes no whole step
    for epoch in count(skip // steps):
        loader.set_epoch(epoch)
        micro_batches = iter(accelerator.skip_first_batches(loader, skip % steps * accumulate))
        for _ in range(skip % steps, steps):
            yield [{"input_ids": x, "labels": x} for x in islice(micro_batches, accumulate)]
        skip = 0


@torch.no_grad()
def perplexity(accelerator: Accelerator, module: nn.Module, heldout: Tensor, args: Settings) -> float:
    """The student's on held-out blocks, every process computing its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    module.eval()
    shares = heldout[rank::world].split(args.batch_size // world)
    loss = torch.stack([module(input_ids=share, labels=share).loss for share in shares]).mean()
    module.train()
    return math.exp(accelerator.reduce(loss, "mean").item())


def train(
    name: str,
    criterion: nn.Module,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Tensor,
    heldout: Tensor,
    args: Settings,
    accelerator: Accelerator,
) -> scale.Curve:
    """Train one student, or go on with it, and save it whole; its held-out perplexity over steps."""
    student = scale.student_of(args, teacher, tokenizer)
    module = kdloss.Distillation(student, teacher, criterion)
    optimizer = AdamW(module.parameters(), args.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    loader = DataLoader(blocks, args.batch_size // args.accumulate, shuffle=True, drop_last=True)
    module, optimizer, loader, schedule = accelerator.prepare(module, optimizer, loader, schedule)
    checkpoints, curve, done = args.output / "checkpoints" / name, [], 0
    if found := complete(checkpoints):
        accelerator.load_state(str(found[-1]))
        curve = json.loads((found[-1] / "curve.json").read_text(encoding="utf-8"))
        done = curve[-1][0]
    stream = batches(loader, accelerator, args.accumulate, skip=done)
    show = accelerator.is_local_main_process
    bar = tqdm(total=args.steps, initial=done, desc=name, unit="step", disable=not show)
    module.train()
    for step in range(done + 1, args.steps + 1):
        micro_batches = next(stream)
        # Dropout repeats itself after an interruption.
        torch.manual_seed(hash((args.seed, step, accelerator.process_index)))
        # Gradients are averaged over processes and micro-batches, which may count different numbers
        # of labels: divided by the labels of all over their number, they are those of one batch.
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
            curve.append((step, perplexity(accelerator, module, heldout, args)))
            bar.set_postfix(held_out=f"{curve[-1][1]:.1f}")
            save(accelerator, curve, checkpoints / f"step-{step:08d}")
    bar.close()
    weights = accelerator.get_state_dict(module)  # every process takes part
    if accelerator.is_main_process:
        scale.save(student, weights, tokenizer, args.output / name)
    accelerator.free_memory()
    return curve


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prepare text and teacher, train two students, report."""
    args = options.read(DEFAULTS, arguments, __doc__)
    cpu = not torch.accelerator.is_available()  # unsaid, two processes without a GPU train each alone
    processes = PartialState(cpu=cpu)
    # Before there is an Accelerator: under ZeRO-3 it makes transformers load every model in shards,
    # which the engine gathers for the student, and nothing would for the teacher.
    parts, first = processes.num_processes * args.accumulate, processes.is_main_process
    teacher, tokenizer, blocks, heldout = scale.prepare(
        args, parts, first, processes.wait_for_everyone, distill_lm.train
    )
    accelerator = Accelerator(
        cpu=cpu,
        # A step always has all its micro-batches; the end of an epoch must not cut it short.
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulate, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed),
    )
    teacher.to(accelerator.device)
    data = (blocks, heldout.to(accelerator.device))
    curves = {
        name: train(name, criterion, teacher, tokenizer, *data, args, accelerator)
        for name, criterion in scale.criteria(args).items()
    }
    results = scale.write(curves, args) if first else {}
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
