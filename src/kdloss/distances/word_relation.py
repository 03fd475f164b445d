"""Word relations of contextual knowledge distillation."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import squared_gap, unit
from kdloss.distances._gram import gram
from kdloss.distances._relations import angles, by_vertex, kl_over
from kdloss.distances._rows import any_width, at_least_one, count, others, rows, spread, whole


@any_width
def word_relation(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    window: int = 21,
    triple_weight: float = 1.0,
) -> Float[Tensor, "*batch rows"]:
    r"""How each word of a sentence stands to the others, in pairs and in triples.

    Pairs: $\frac1N \mathrm{KL}(p_{\cdot|i} \,\|\, q_{\cdot|i})$ with $p_{\cdot|i}$ the softmax of the
    cosines of word i with all other words. Triples, `triple_weight` times: the mean of $(\cos^s_{jik} -
    \cos^t_{jik})^2$ over words j and k of the window around word i (`window` words, i in the middle), the
    cosines being those of `rkd_angle`. Both as the authors' code has them by default, the mean over all
    N² pairs included; it repeats the first and last words where a window reaches beyond the sentence, and
    looks at padding in it, while here a window ends there.

    The paper's layer transforming relation is the same across the layers of one word: give its layers as
    rows, `torch.stack(layers, 2).flatten(0, 1)` of shape `[B·T, L, D]`, to this with an odd window of
    2 L − 1, or to `rkd_distance` and `rkd_angle`.

    Shapes: student `[..., N, D]` and teacher `[..., N, D']` (widths may differ), a sentence in each
    example. `mask` is `[..., N]` (True = counts); a window goes over the words that count. Returns `[..., N]`,
    in float32 or better. The teacher is detached.

    Raises: ValueError for one row alone, a window that is not odd and positive, positions or devices that
    differ, or maps that are not rows; TypeError for integer features.

    >>> import torch
    >>> words = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> word_relation(2 * words.flip(1), words).sum() < 1e-6
    tensor(True)

    Park, Kim, Yang 2021, "Distilling Linguistic Context for Language Model Compression", arXiv:2109.08359,
    and their code.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window counts the word in its middle too: an odd number, got {window}")
    s, t, keep = rows("word_relation", student, teacher, mask)
    values = kl_over(_cosines(s), _cosines(t), others(keep, s))
    values = values / count(keep, values)
    if s.shape[1]:
        values = values + triple_weight * _triples(s, t, keep, min(window // 2, s.shape[1] - 1))
    return spread(values, keep, student.shape[:-1])


def _triples(s: Tensor, t: Tensor, keep: Tensor | None, reach: int) -> Tensor:
    """The mean squared difference of the angles at each word, `[B, N]`, among those within reach."""
    there = whole(keep, s)
    if keep is not None:  # the words that count stand beside each other, before the others
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
