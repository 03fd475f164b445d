"""Whether the rows of a stored teacher stand at the tokens of a batch."""

from typing import Any

import torch
from torch import Tensor

from kdloss.targets import TopKLogits
from kdloss.targets.looks import free_to_look
from kdloss.terms._outputs import find_logits


@torch.compiler.disable  # type: ignore[untyped-decorator]
def refuse_misplaced(output: Any, attention_mask: Tensor, *, always: bool = False) -> None:
    """Raise if an example of a stored teacher's output has rows at padding and lacks rows at tokens.

    `always` looks at the numbers on an accelerator too, which makes the device wait.
    """
    rows = find_logits(output)
    if not isinstance(rows, TopKLogits) or rows.shape[:-1] != attention_mask.shape:
        return
    if rows.indices.is_meta or not (always or free_to_look(rows.indices, attention_mask)):
        return
    empty = rows.empty()
    real = attention_mask.bool().to(empty.device)
    at_padding, without = ~empty & ~real, empty & real
    wrong = at_padding.any(-1) & without.any(-1)
    if wrong.any():
        example = int(wrong.int().argmax())
        there, gap = (int(x[example].int().argmax()) for x in (at_padding, without))
        raise ValueError(
            f"the stored teacher has a row at position {there} of example {example}, where attention_mask is 0, and "
            f"none at {gap}, where it is 1: stored rows are padded on the right. Pad the batch on the right too "
            '(tokenizer.padding_side = "right"), or place the rows by the mask: cache.batch(ids, attention_mask=...)'
        )
