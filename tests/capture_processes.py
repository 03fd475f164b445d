"""Capturing in each gloo process: torchrun --nproc-per-node N tests/capture_processes.py OUTPUT."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kdloss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def shard(model):
    from torch.distributed.fsdp import fully_shard  # since torch 2.6

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


CASES = {  # how student and teacher are wrapped
    "ddp": (DistributedDataParallel, DistributedDataParallel),
    "fsdp": (shard, shard),
    "ddp, teacher in shards": (DistributedDataParallel, shard),
}


def data():
    torch.manual_seed(0)
    return Net(3).double(), Net(5).double(), torch.randn(4, 4, dtype=torch.float64)


def step(student, teacher, x):
    """Compare student blocks 0 and 2 with teacher blocks 1 and 3, where the teacher stops; penalise the output."""
    with kdloss.capture(student, [0, 2]) as s:
        out = student(x)
    with torch.no_grad(), kdloss.capture(teacher, [1, 3], stop=True) as t:
        teacher(x)
    assert t.output is None
    assert all(type(f) is torch.Tensor for f in (*s.values(), *t.values()))
    return sum((s[i] - t[i + 1]).square().mean() for i in (0, 2)) + out.square().mean()


def gradients(model):
    found = (p.grad for p in model.parameters())
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def run(wrap_student, wrap_teacher):
    student, teacher, x = data()
    student, teacher = wrap_student(student), wrap_teacher(teacher)
    mine = x[dist.get_rank() :: dist.get_world_size()]
    found = {"student": []}
    for _ in (1, 2):
        student.zero_grad()
        step(student, teacher, mine).backward()
        found["student"].append(gradients(student))
    found["in shards"] = all(hasattr(p, "full_tensor") for p in teacher.parameters())
    with torch.no_grad():
        found["output"] = teacher(x)
    teacher(mine).square().mean().backward()
    found["teacher"] = gradients(teacher)
    teacher.zero_grad()
    if isinstance(teacher, DistributedDataParallel):
        with pytest.raises(RuntimeError, match="stop=False for a model that is trained"):
            partial(teacher, mine)
        with teacher.no_sync():
            partial(teacher, mine)
    else:
        partial(teacher, mine).backward()
        found["part"] = gradients(teacher)
    return found


def partial(model, x):
    with kdloss.capture(model, [1], stop=True) as seen:
        model(x)
    return seen[1].square().mean()


class Part(nn.Module):
    """A student whose forward returns a loss of features that uses neither its head nor its last block."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x):
        return partial(self.student, x)


def run_part():
    """Run two steps under DDP with the pass stopped early, so that the modules after it are unused parameters."""
    student, _, x = data()
    wrapped = DistributedDataParallel(Part(student), find_unused_parameters=True)
    for _ in (1, 2):
        student.zero_grad()
        wrapped(x[dist.get_rank() :: dist.get_world_size()]).backward()
    return gradients(student)


def main(folder):
    dist.init_process_group("gloo")
    found = {name: run(*wraps) for name, wraps in CASES.items()} | {"part": run_part()}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
