"""The most probable classes of logits, a block of rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdloss.reduction import precise


def most_probable(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and log-probabilities `[..., k]` of the k most probable classes, and of all others together `[...]`."""
    blocks = [_top_and_others(rows, k, temperature) for rows in _blocks(logits)]
    indices, top, low, mass = (torch.cat(found) for found in zip(*blocks, strict=True))
    largest = _largest(top)
    kept = (top - largest) / temperature
    few = kept.logsumexp(-1, keepdim=True)
    others = mass.log() + (low - largest) / temperature
    log_probs = kept - few + logsigmoid(few - others)
    log_rest = logsigmoid(others - few)  # from the odds, since the logarithm of a mass near 1 would have few digits
    shape = logits.shape[:-1]
    return indices.view(*shape, k), log_probs.view(*shape, k), log_rest.view(shape)


def _blocks(logits: Tensor) -> Iterator[Tensor]:
    """Blocks of rows `[r, V]`, small enough for a CPU's cache, or large enough to fill another device."""
    if logits.ndim > 2 and not logits.is_contiguous():  # a slice of a tensor: reshape would copy all of it
        for example in logits:
            yield from _blocks(example)
        return
    rows = logits.reshape(-1, logits.shape[-1])
    if torch.compiler.is_compiling():
        yield rows
        return
    entries = 2**19 * torch.get_num_threads() if logits.is_cpu else 2**27
    yield from torch.split(rows, max(1, entries // rows.shape[-1]))


def _top_and_others(rows: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices and logits `[r, k]` of the most probable classes; the others' largest logit and their mass, `[r, 1]`.

    The mass is relative to the others' largest logit, since relative to the kept classes it may underflow.
    """
    rows = precise(rows)
    top = rows.topk(k)
    others = rows.scatter(-1, top.indices, -torch.inf)
    low = _largest(others)
    others = others.sub_(low) if temperature == 1 else others.sub_(low).div_(temperature)
    return top.indices, top.values, low, others.exp_().sum(-1, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    """The largest entry of each row `[..., 1]`, 0 where that is -inf."""
    found = x.amax(-1, keepdim=True)
    return found.masked_fill(found == -torch.inf, 0)
