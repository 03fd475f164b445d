"""Rows against a teacher of which the k most probable classes were kept."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss.engine.side import New, Side
from kdloss.engine.task import TeacherTask
from kdloss.reduction import precise
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import base


class AmongFew(NamedTuple):
    """Values `[r, 1]`, and the gradient: `slope` at `classes`, `share` of what the others have."""

    value: Tensor
    others: Tensor
    share: Tensor
    classes: Tensor
    slope: Tensor


def among_few(task: TeacherTask, z: Tensor, teacher: TopKLogits, wanted: bool, new: New) -> AmongFew:
    """Compared among the k classes and a bucket, at the temperature the teacher's were kept at.

    The divergence itself, by autograd, sees those few. In the student's logits the bucket's gradient goes to the
    classes in it by their share of its mass.
    """
    indices, empty = teacher.slots()
    nothing = empty.all(-1, keepdim=True)
    others = _others(z, indices, new())
    kept = z.gather(-1, indices).to(others.dtype).masked_fill(empty, -torch.inf)
    if teacher.tail == "renormalise":
        few, mass, others = kept - base(kept), kept.new_ones(len(z), 1), others.zero_()
    else:  # a side of its own: beside the classes kept, the others may be too small for a number
        rest = Side(others, teacher.temperature, new, normalise=False)
        largest = rest.top.masked_fill(rest.total == 0, -torch.inf)
        low = base(kept, largest)
        size = (rest.log_total * rest.temperature).to(kept.dtype) + (rest.top - low)
        few, mass, others = torch.cat([kept - low, size], -1), rest.total, rest.probs
    with torch.set_grad_enabled(wanted):
        few = few.masked_fill(nothing, 0).detach().requires_grad_(wanted)
        values = replace(task, labels=None).diverge(few, teacher.logits(empty, z.shape[-1]))
        values = values.masked_fill(nothing.squeeze(-1), 0)
        slope = torch.autograd.grad(values.sum(), few)[0] if wanted else torch.zeros_like(few)
    k = indices.shape[-1]
    share = slope[:, k:].sum(-1, keepdim=True) / mass.masked_fill(mass == 0, 1)
    return AmongFew(values.detach().unsqueeze(-1), others, share, indices, slope[:, :k].masked_fill(empty, 0))


def _others(z: Tensor, indices: Tensor, out: Tensor | None) -> Tensor:
    """Logits of the classes that were not kept, in the precision that they are computed in."""
    others = precise(z).clone() if out is None else out.copy_(z)
    return others.scatter_(-1, indices, -torch.inf)
