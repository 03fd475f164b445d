"""Training in each of two gloo processes: torchrun --nproc-per-node 2 tests/two_processes.py OUTPUT FLAGS."""

import os
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import distributed
import torch
import torch.distributed as dist
from families import batch, build
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kdloss

STEPS = 3
SHARED = {"projection": kdloss.projections.mlp, "shared": True, "distance": kdloss.distances.VID}
CASES = {  # how the student is wrapped, whether the teacher is sharded, whether its pass stops early, settings
    "ddp": ("ddp", False, False),
    "fsdp": ("fsdp", False, False),
    "fsdp, sharded teacher": ("fsdp", True, False),
    "fsdp, sharded teacher that stops early": ("fsdp", True, True),
    "ddp of the student alone": ("ddp of the student alone", False, False),
    "ddp, one shared mlp and VID": ("ddp", False, False, SHARED),
    "fsdp, one shared mlp and VID": ("fsdp", False, False, SHARED),
}


def shard(model, root=None):
    for block in kdloss.layers.find_blocks(model):
        fully_shard(block)
    return fully_shard(root or model)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(wrap=None, sharded=False, early=False, settings=()):
    """Train on this process's share of the batch; return gradients, gradient norms before clipping, and weights."""
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", depth=2, seed=1)
    torch.manual_seed(0)
    weight = 0.0 if early else 1.0
    criterion = kdloss.FeatureKD("all", pairing="first", logit_weight=weight, **dict(settings))
    module = step = kdloss.Distillation(student, teacher, criterion)
    if wrap == "ddp":
        step = DistributedDataParallel(module)
    elif wrap == "fsdp":
        shard(student, module)
    elif wrap is not None:
        wrapped, distill = DistributedDataParallel(student), kdloss.Distiller(teacher, criterion)

        def step(**inputs):
            return distill(wrapped, **inputs)

    if sharded:
        shard(teacher)
    inputs, world = batch("gpt2"), 1 if wrap is None else dist.get_world_size()
    items = (inputs["labels"][:, 1:] != -100).sum() / world  # gradients are averaged over ranks
    share = slice(None) if wrap is None else slice(dist.get_rank(), dist.get_rank() + 1)
    mine = {name: tensor[share] for name, tensor in inputs.items()}
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    found = {"gradients": [], "norms": []}
    for _ in range(STEPS):
        step(**mine, num_items_in_batch=items).loss.backward()
        if wrap == "ddp of the student alone":  # projections are outside DDP, so their gradients are averaged here
            for parameter in criterion.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        found["gradients"].append({name: whole(p.grad) for name, p in parameters.items()})
        found["norms"].append(whole(nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = {name: whole(p) for name, p in parameters.items()}
    found["teacher in shards"] = all(isinstance(p, DTensor) for p in teacher.parameters())
    return found


def main(output, flags):
    """Run FSDP, the cases above, and DDP; after a kill at any time, a new call runs only what is missing.

    Everything uses one process group: a second one in the same process can find the addresses of the first in
    torchrun's store, and hang.
    """
    file = output / f"{os.environ['RANK']}.pt"
    with patch.object(dist, "destroy_process_group"):
        distributed.main([*flags, "--fsdp", "--output", str(output / "fsdp")])
    if not file.exists():
        torch.save({name: train(*case) for name, case in CASES.items()}, file)
    distributed.main([*flags, "--accumulate", "2", "--output", str(output / "ddp")])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
