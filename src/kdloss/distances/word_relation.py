"""Word relations of contextual knowledge distillation."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap, unit
from kdloss.distances._gram import gram
from kdloss.distances._relations import angles, by_vertex, kl_over
from kdloss.distances._rows import any_width, at_least_one, count, full_mask, off_diagonal_mask, prepare_rows, spread


@any_width
def word_relation(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    window: int = 21,
    triple_weight: float = 1.0,
) -> Float[Tensor, "*batch rows"]:
    r"""Relations of each word of a sentence to the others: KL over pairs plus squared error over triples.

    Pairs: $\frac1N \mathrm{KL}(p_{\cdot|i} \,\|\, q_{\cdot|i})$ with $p_{\cdot|i}$ the softmax of the
    cosines of word i with all other words. Triples, `triple_weight` times: the mean of $(\cos^s_{jik} -
    \cos^t_{jik})^2$ over words j and k of the window around word i (`window` words, i in the middle), with the
    cosines of `rkd_angle`. Both are the defaults of the authors' code, including the mean over all N² pairs.
    One difference: where a window reaches beyond the sentence, their code repeats the first and last words and
    reads padding; here the window ends there.

    The paper's layer transforming relation is the same loss across the layers of one word. Give the layers as
    rows, `torch.stack(layers, 2).flatten(0, 1)` of shape `[B·T, L, D]`, to this function with a window of
    2 L − 1 (which is odd), or to `rkd_distance` and `rkd_angle`.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ), one sentence for each
    example. `mask` is `[..., N]` (True = counts); a window spans the words that count. Returns `[..., N]`,
    in float32 or better. The teacher is detached.

    Raises: ValueError for a single row, a window that is not odd and positive, positions or devices that
    differ, and maps (call `tokens` first); TypeError for integer features.

    >>> import torch
    >>> words = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> word_relation(2 * words.flip(1), words).sum() < 1e-6
    tensor(True)

    Park, Kim, Yang 2021, "Distilling Linguistic Context for Language Model Compression", arXiv:2109.08359,
    and their code.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window counts the word in its middle too: an odd number, got {window}")
    s, t, keep = prepare_rows("word_relation", student, teacher, mask)
    values = kl_over(_cosines(s), _cosines(t), off_diagonal_mask(keep, s))
    values = values / count(keep, values)
    if s.shape[1]:
        values = values + triple_weight * _triples(s, t, keep, min(window // 2, s.shape[1] - 1))
    return spread(values, keep, student.shape[:-1])


def _triples(s: Tensor, t: Tensor, keep: Tensor | None, reach: int) -> Tensor:
    """The mean squared difference of the cosines at each word between words within `reach`, `[B, N]`."""
    there = full_mask(keep, s)
    if keep is not None:  # move the words that count to the front, in order
        order = (~keep).int().argsort(stable=True, dim=-1)
        s, t = (torch.take_along_dim(x, order.unsqueeze(-1), 1) for x in (s, t))
        there = keep.take_along_dim(order, 1)
    window = 2 * reach + 1
    each = s.shape[0] * window * (window + s.shape[-1])
    padded = [F.pad(x, (0, 0, reach, reach)) for x in (s, t)]
    values = by_vertex(partial(_gaps, window), s.shape[1], each, *padded, F.pad(there, (reach, reach)))
    return values if keep is None else values.take_along_dim((keep.cumsum(-1) - 1).clamp_min(0), 1)


def _gaps(window: int, start: int, stop: int, s: Tensor, t: Tensor, there: Tensor) -> Tensor:
    s, t, there = (x[:, start : stop + window - 1].unfold(1, window, 1) for x in (s, t, there))
    middle = slice(window // 2, window // 2 + 1)
    a, b = (angles((x - x[..., middle]).mT, there) for x in (s, t))
    return squared_gap(a, b).sum((-2, -1)) / at_least_one(there.sum(-1)) ** 2


def _cosines(x: Tensor) -> Tensor:
    x = unit(x)
    return gram(x)
