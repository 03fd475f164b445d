"""Cross-entropy of a block of rows, from exponentials that were computed already."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdloss.engine.side import LN2, Side
from kdloss.engine.task import LabelTask


class Unsoftened(NamedTuple):
    """A student's unnormalised probabilities at T = 1, their sum, and the log of the sum of its exponentials."""

    e: Tensor
    total: Tensor
    log_total: Tensor


class Target(NamedTuple):
    r"""Cross-entropy with the targets $a_c = w_c ((1 - \epsilon) y_c + \epsilon / C)$ of each row.

    Its value, the sum of a, and a itself: `everywhere` in all classes, plus `at_label` at the class `label`. The
    gradient by the logits is the sum times the probabilities, minus a. None stands for a number that is 1 in all rows.
    """

    value: Tensor
    sums: Tensor | None
    everywhere: Tensor | None = None
    label: Tensor | None = None
    at_label: Tensor | None = None


def of_probabilities(task: LabelTask, q: Side, one: Unsoftened) -> Target:
    """The target of labels `[r, V]` that are probabilities."""
    a = task.labels.to(q.logits.dtype, copy=True)
    if task.smoothing > 0:
        a.mul_(1 - task.smoothing).add_(task.smoothing / a.shape[-1])
    if task.class_weights is not None:
        a.mul_(task.class_weights)
    sums = q.sum(a)
    # 0 log 0 is 0; a NaN that this replaces still shows in the sum of a times log_total.
    gaps = q.sum((a * q.bits).nan_to_num_(0.0, neginf=-torch.inf))
    return Target(sums * one.log_total - q.temperature * LN2 * gaps, sums, a)


def of_classes(task: LabelTask, z: Tensor, q: Side, one: Unsoftened) -> Target:
    """The target of labels `[r]` that are classes."""
    labels = task.labels.unsqueeze(-1)
    mine, here = labels, None
    if q.shard is not None:
        mine = labels - q.shard.offset
        here = (mine >= 0) & (mine < z.shape[-1])
        mine = mine.where(here, 0)
    wide, top = one.total.dtype, q.top.to(one.total.dtype)
    right = z.gather(-1, mine).to(wide) if z.shape[-1] else top.clone()
    if q.shard is not None and here is not None:
        right = q.shard.sum(right.masked_fill(~here, 0))
    value = one.log_total + (top - right)
    if task.class_weights is None and task.smoothing == 0 and here is None:
        return Target(value, None, None, mine)
    y = torch.ones_like(one.total)
    if task.class_weights is not None:
        y = task.class_weights[labels].to(wide)
        value = torch.where(y == 0, one.log_total * 0, y * value)
    at_label = y if task.smoothing == 0 else y * (1 - task.smoothing)
    at_label_here = at_label if here is None else at_label.masked_fill(~here, 0)
    if task.smoothing == 0:
        return Target(value, y, None, mine, at_label_here)
    spread, total, share = _spread(task, q, one)
    if task.smoothing < 1:  # at 1 the label has no weight, even where its logit is -inf
        spread = spread + (1 - task.smoothing) * value
    return Target(spread, at_label + total, share, mine, at_label_here)


def _spread(task: LabelTask, q: Side, one: Unsoftened) -> tuple[Tensor, Tensor, Tensor]:
    """What smoothing adds to the value, the sum of its share over classes, and the share `[1, 1]` or `[1, V]`."""
    classes = q.logits.shape[-1] if q.shard is None else sum(q.shard.sizes)
    if task.class_weights is None:
        share = q.logits.new_full((1, 1), task.smoothing / classes)
        total = one.total.new_full((1, 1), task.smoothing)
        bits = q.sum(q.bits) * (task.smoothing / classes)
    else:
        start = 0 if q.shard is None else q.shard.offset
        weights = task.class_weights[start : start + q.logits.shape[-1]]
        share = (weights.to(one.total.dtype) * (task.smoothing / classes)).to(q.logits.dtype).unsqueeze(0)
        total = task.class_weights.sum(dtype=one.total.dtype).reshape(1, 1) * (task.smoothing / classes)
        bits = q.sum((q.bits * share).nan_to_num_(0.0, neginf=-torch.inf))
    return total * one.log_total - q.temperature * LN2 * bits, total, share
