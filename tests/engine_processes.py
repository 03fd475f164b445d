"""What each of two gloo processes runs: torchrun --nproc-per-node 2 tests/engine_processes.py OUTPUT."""

import os
import sys
from pathlib import Path

import device
import torch
import torch.distributed as dist
from leaving import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kdloss


class Model(nn.Module):
    """A model whose forward returns hidden states; the loss applies the head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(13, 4), nn.Linear(4, 11)

    def forward(self, tokens):
        return self.body(tokens).tanh()


def data():
    torch.manual_seed(0)
    model = Model().double()
    labels = torch.randint(11, (4, 5))
    labels[0, :3] = -100
    return model, torch.randint(13, (4, 5)), labels


def teacher():
    return torch.randn(4, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, tokens, labels = data()
    wrapped, mine = DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2)
    items = (labels != -100).sum() / dist.get_world_size()  # DDP averages over ranks
    for _ in (1, 2):  # DDP rebuilds its buckets after the first step
        model.zero_grad()
        hidden = wrapped(tokens[mine])
        student = kdloss.LazyLogits(hidden, model.head.weight, model.head.bias)
        criterion = kdloss.VanillaKD(2.0, 0.5)
        criterion(student, teacher()[mine], labels[mine], num_items_in_batch=items).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    device.use()
    main(Path(sys.argv[1]))
