"""What each of two gloo processes runs; apart from the test, so that a spawned process can import it."""

import warnings

import torch
import torch.distributed as dist
from families import batch, build
from torch.nn.parallel import DistributedDataParallel

import kdloss


def models():
    teacher = build("gpt2", width=24, depth=4).eval()
    student = build("gpt2", depth=2, seed=1).eval()
    torch.manual_seed(0)
    criterion = kdloss.FeatureKD(logit_weight=1.0)
    return student, criterion, kdloss.Distiller(teacher, criterion).prepare(student)


def counted(inputs):
    return (inputs["labels"][:, 1:] != -100).sum()


def work(rank, port, path):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    student, criterion, distill = models()
    wrapped = DistributedDataParallel(student)
    inputs = batch("gpt2")
    mine = {name: x[rank : rank + 1] for name, x in inputs.items()}
    # DDP averages over ranks, so the number of items is that of all ranks over the number of ranks
    out = distill(wrapped, **mine, num_items_in_batch=counted(inputs) / 2)
    out.loss.backward()
    for p in criterion.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    grads = [p.grad for p in [*student.parameters(), *criterion.parameters()]]
    torch.save(grads, f"{path}/{rank}.pt")
    dist.destroy_process_group()
