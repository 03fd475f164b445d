"""Rows against a teacher of which the k most probable classes were kept."""

from dataclasses import replace

import torch
from torch import Tensor

from kdloss.engine.side import New, Side
from kdloss.engine.task import TeacherTask
from kdloss.reduction import precise
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import log_mass


def by_top_k(
    task: TeacherTask, z: Tensor, q: Side, teacher: TopKLogits, wanted: bool, new: New
) -> tuple[Tensor, Tensor | None]:
    """Values of these rows and, if wanted, their gradient; q is the student at the teacher's temperature.

    The divergence itself, by autograd, sees the k classes and the bucket. In the student's logits the
    bucket's gradient goes to the classes in it by their share of its mass.
    """
    indices, empty = teacher.slots()
    out = new()
    others = q.probs.clone() if out is None else out.copy_(q.probs)
    kept, mass = precise(z.gather(-1, indices)), q.sum(others.scatter_(-1, indices, 0))
    rest = log_mass(mass.to(kept.dtype), q.log_total.to(kept.dtype) + q.top / q.temperature) * q.temperature
    with torch.set_grad_enabled(wanted):
        few = kept.masked_fill(empty, -torch.inf)
        few = (few if teacher.tail == "renormalise" else torch.cat([few, rest], -1)).detach()
        few.requires_grad_(wanted)
        values = replace(task, labels=None).diverge(few, teacher.logits(empty, z.shape[-1]))
        if not wanted:
            return values, None
        (slope,) = torch.autograd.grad(values.sum(), few)
    k = indices.shape[-1]
    share = slope[:, k:].sum(-1, keepdim=True) / mass.masked_fill(mass == 0, 1)
    others.mul_(share.to(others.dtype))
    others.scatter_add_(-1, indices, slope[:, :k].masked_fill(empty, 0))
    return values.detach(), others
