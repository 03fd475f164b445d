"""Run by each of several gloo processes: torchrun --nproc-per-node 4 this_file OUTPUT."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import kdloss
import kdloss.engine.block_sizes
from kdloss.engine import LabelTask, Problem, TeacherTask, fused

try:
    from torch.distributed.tensor import Shard, distribute_tensor
except ImportError:  # before torch 2.5
    from torch.distributed._tensor import Shard, distribute_tensor

SIZES = {2: (8, 11), 4: (7, 0, 5, 7)}  # the number of classes of each process; one has none
CASES = {
    "forward_kl": kdloss.VanillaKD(2.0, 0.0),
    "reverse_kl": kdloss.VanillaKD(3.0, 0.0, divergence=kdloss.divergences.reverse_kl),
    "jsd": kdloss.VanillaKD(1.0, 0.0, divergence=partial(kdloss.divergences.jsd, beta=0.3)),
    "ce": kdloss.VanillaKD(2.0, 1.0),
    "mixed": kdloss.VanillaKD(2.0, 0.4, reduction="sum"),
}


def data():
    """Student (hidden, weight, bias), logits of the teacher, and labels; the same in every process."""
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, 3, 5), "weight": (19, 5), "bias": (19,), "teacher": (2, 3, 19)}
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    labels = torch.randint(0, 19, (2, 3), generator=g)
    labels[1, 0] = -100
    return tensors, labels


def gradients(criterion, student, leaves, teacher, labels):
    loss = criterion(student, teacher, labels)
    grads = torch.autograd.grad(2 * loss, leaves)
    full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return {"loss": loss.detach(), "grad": full, "components": criterion.components}


def main():
    dist.init_process_group("gloo")
    # several blocks of rows, the same on every rank
    kdloss.engine.block_sizes.block_rows = lambda device, row_bytes: 1 + row_bytes // 8 % 3
    rank, world = dist.get_rank(), dist.get_world_size()
    x, labels = data()
    start = sum(SIZES[world][:rank])
    mine = slice(start, start + SIZES[world][rank])
    teacher = kdloss.ShardedLogits(x["teacher"][..., mine])
    logits = (x["hidden"] @ x["weight"].T + x["bias"])[..., mine].clone().requires_grad_()
    head = [t.clone().requires_grad_() for t in (x["hidden"], x["weight"][mine], x["bias"][mine])]
    lazy = kdloss.ShardedLogits(kdloss.LazyLogits(*head))
    results = {}
    for name, criterion in CASES.items():
        of_logits = gradients(criterion, kdloss.ShardedLogits(logits), [logits], teacher, labels)
        of_lazy = gradients(criterion, lazy, head, teacher, labels)
        results[name] = {"logits": of_logits, "lazy": of_lazy}
    each = kdloss.divergences.forward_kl(kdloss.ShardedLogits(logits), teacher)
    results["each position"] = torch.autograd.grad((each * torch.arange(6).view(2, 3)).sum(), logits)[0]
    if world == 2:
        mesh = init_device_mesh("cpu", (2,))
        placed = distribute_tensor(x["teacher"], mesh, [Shard(-1)])
        full = x["hidden"] @ x["weight"].T + x["bias"]
        student = distribute_tensor(full, mesh, [Shard(-1)]).requires_grad_()
        hidden = x["hidden"].clone().requires_grad_()
        shards = [distribute_tensor(x[name], mesh, [Shard(0)]).requires_grad_() for name in ("weight", "bias")]
        for name, criterion in CASES.items():
            results[name]["dtensor"] = gradients(criterion, student, [student], placed, labels)
            lazy = kdloss.LazyLogits(hidden, *shards)
            results[name]["lazy dtensor"] = gradients(criterion, lazy, [hidden, *shards], placed, labels)
    for name, student, leaves in (
        ("several", kdloss.ShardedLogits(logits), [logits]),
        ("lazy several", lazy_logits(head), head),
    ):
        loss, values = fused(*Problem.of(tasks(teacher, labels), student, None, 6), several_weights())
        results[name] = {"values": values, "grad": torch.autograd.grad(loss, leaves)}
    results["refused"] = refused(logits, teacher, x["teacher"])
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    dist.destroy_process_group()


def lazy_logits(head):
    return kdloss.ShardedLogits(kdloss.LazyLogits(*head))


def class_weights():
    return torch.linspace(0, 2, 19, dtype=torch.float64)


def several_weights():
    return torch.linspace(0.5, 2, 24, dtype=torch.float64).view(4, 6)


def tasks(teacher, labels):
    """Two cross-entropies and two divergences in one sweep."""
    y = labels.reshape(-1).clamp_min(0)
    return [
        LabelTask(y, smoothing=0.2, class_weights=class_weights()),
        LabelTask(y, smoothing=0.1),
        TeacherTask(kdloss.divergences.forward_kl, teacher, 2.0),
        TeacherTask(kdloss.divergences.reverse_kl, teacher, 2.0),
    ]


def refused(logits, teacher, full_teacher):
    """The error messages for a mix of sharded and full logits and for what sharded logits don't support."""
    student = kdloss.ShardedLogits(logits)
    calls = {
        "whole teacher": lambda: kdloss.divergences.forward_kl(student, full_teacher),
        "own divergence": lambda: kdloss.VanillaKD(alpha=0.0, divergence=custom_divergence)(student, teacher),
        "soft labels": lambda: LabelTask(full_teacher.softmax(-1)).check(student),
        "hard labels": lambda: kdloss.divergences.hard_labels(student, teacher),
        "second derivative": lambda: torch.autograd.grad(
            kdloss.divergences.forward_kl(student, teacher).sum(), logits, create_graph=True
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)
    return messages


def custom_divergence(student, teacher, *, temperature):
    return (student - teacher).square().sum(-1)


if __name__ == "__main__":
    main()
