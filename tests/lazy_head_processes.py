"""The script of each of two gloo processes: torchrun --nproc-per-node 2 tests/lazy_head_processes.py OUTPUT."""

import sys
import warnings
from pathlib import Path

import device
import torch
import torch.distributed as dist
from families import batch, build
from leaving import leave
from torch.nn.parallel import DistributedDataParallel

import kdloss

STEPS = 3
CASES = {
    "tied": ("gpt2", {}),
    "untied": ("llama", {}),
    "tied, looking for unused parameters": ("gpt2", {"find_unused_parameters": True}),
    "untied, looking for unused parameters": ("llama", {"find_unused_parameters": True}),
    "a static graph": ("llama", {"static_graph": True}),
    "in shards": ("llama", None),
}
if device.NAME != "cpu":  # gloo cannot scatter on a GPU
    del CASES["in shards"]


def train(family, settings, wrap=True):
    """Gradients of a few steps on this process's part of the batch, and the types of logits that the loss got."""
    from torch.distributed.fsdp import fully_shard  # since torch 2.6

    student, teacher = build(family), build(family, seed=1).eval()
    model = student
    if wrap:
        model = fully_shard(student) if settings is None else DistributedDataParallel(student, **settings)
    distill = kdloss.Distiller(teacher, kdloss.VanillaKD())
    inputs, world = batch(family), 2 if wrap else 1
    items = (inputs["labels"][:, 1:] != -100).sum() / world  # gradients are averaged over ranks
    share = slice(dist.get_rank(), dist.get_rank() + 1) if wrap else slice(None)
    local = {name: tensor[share] for name, tensor in inputs.items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    gradients, kinds = [], set()
    for _ in range(STEPS):
        out = distill(model, **local, num_items_in_batch=items)
        kinds.add(type(out.output.logits).__name__)
        out.loss.backward()
        gradients.append({name: unsharded(p.grad) for name, p in student.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(2):  # FSDP does not shard its root again after the first pass
            kinds.add(type(distill(model, **local).output.logits).__name__)
    return {"gradients": gradients, "kinds": kinds}


def unsharded(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device.use()
    dist.init_process_group("gloo")
    results = {name: train(*case) for name, case in CASES.items()}
    torch.save(results, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
