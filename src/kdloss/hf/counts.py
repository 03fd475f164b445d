"""The number of labels that divides the loss of a Trainer's step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdloss._masks import label_positions
from kdloss.terms._outputs import class_indices, find_logits
from kdloss.terms._positions import Positions
from kdloss.terms.contract import Contract


def as_labels(where: Positions, batch: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """A batch whose labels are -100 where no term counts them and 0 elsewhere, for a Trainer to count."""
    labels = _labels(batch)
    counted = torch.zeros(where.shape, dtype=torch.long, device=labels.device)
    if where.keep is not None:
        (counted[:, 1:] if where.causal else counted).masked_fill_(~where.keep, -100)
    classes = class_indices(labels)
    if where.causal and classes is not None:  # a Trainer may count the first labels, which are never predicted
        counted[:, :1].masked_fill_(classes[:, :1] == contract.ignore_index, -100)
    return {**batch, **{name: counted for name in ("labels", "shift_labels") if batch.get(name) is not None}}


def refuse_elsewhere(where: Positions, batch: Mapping[str, Any], output: Any, contract: Contract) -> None:
    """Raise if the positions that were counted before the student ran aren't those that the criterion counts."""
    logits, labels = find_logits(output), _labels(batch)
    if logits is None:
        return
    layout = contract.layouts[0]
    shape = logits.shape if layout is None else layout.shape(logits.shape)
    if label_positions(labels, shape) != where.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} don't stand at the positions of the logits {tuple(shape)}, so their number "
            "can't divide the loss. For the mean of each batch write student.accepts_loss_kwargs = False before you "
            "make the trainer, without count='student'"
        )


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor = batch["labels"] if batch.get("shift_labels") is None else batch["shift_labels"]
    return labels
