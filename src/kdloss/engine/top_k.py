"""Rows against a teacher of which the k most probable classes were kept."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss.engine.side import New, Side
from kdloss.engine.task import TeacherTask
from kdloss.reduction import precise
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import log_mass


class AmongFew(NamedTuple):
    """Values `[r, 1]`, and the gradient: `slope` at `classes`, `share` of what the others have."""

    value: Tensor
    others: Tensor
    share: Tensor
    classes: Tensor
    slope: Tensor


def among_few(
    task: TeacherTask, z: Tensor, q: Side, teacher: TopKLogits, wanted: bool, alone: bool, new: New
) -> AmongFew:
    """Compared among the k classes and a bucket; q is the student at the teacher's temperature.

    The divergence itself, by autograd, sees those few. In the student's logits the bucket's gradient goes to the
    classes in it by their share of its mass. If nobody else reads q, it is overwritten (`alone`).
    """
    indices, empty = teacher.slots()
    nothing = empty.all(-1, keepdim=True)
    others = q.probs if alone else _copy(q.probs, new())
    kept, mass = precise(z.gather(-1, indices)), q.sum(others.scatter_(-1, indices, 0))
    log_size = (q.log_total - q.total.log()).to(kept.dtype) + q.top / q.temperature
    rest = log_mass(mass.to(kept.dtype), log_size) * q.temperature
    with torch.set_grad_enabled(wanted):
        few = kept.masked_fill(empty, -torch.inf)
        few = (few if teacher.tail == "renormalise" else torch.cat([few, rest], -1)).detach()
        few = few.masked_fill(nothing, 0).requires_grad_(wanted)
        values = replace(task, labels=None).diverge(few, teacher.logits(empty, z.shape[-1]))
        values = values.masked_fill(nothing.squeeze(-1), 0)
        slope = torch.autograd.grad(values.sum(), few)[0] if wanted else torch.zeros_like(few)
    k = indices.shape[-1]
    share = slope[:, k:].sum(-1, keepdim=True) / mass.masked_fill(mass == 0, 1)
    return AmongFew(values.detach().unsqueeze(-1), others, share, indices, slope[:, :k].masked_fill(empty, 0))


def _copy(x: Tensor, out: Tensor | None) -> Tensor:
    return x.clone() if out is None else out.copy_(x)
