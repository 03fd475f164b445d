"""Word relations of contextual knowledge distillation."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._features import unit
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
    keep = whole(keep, s)
    values = kl_over(_cosines(s), _cosines(t), others(keep, s))
    values = values / count(keep, values)
    place = keep.cumsum(-1)
    near = (place.unsqueeze(-2) - place.unsqueeze(-1)).abs() <= window // 2

    def triples(start: int, stop: int, s: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        there = keep.unsqueeze(1) & near[:, start:stop]
        gaps = (angles(s, start, stop, there) - angles(t, start, stop, there)).square()
        return gaps.sum((-2, -1)) / at_least_one(there.sum(-1)) ** 2

    values = values + triple_weight * by_vertex(triples, s, t, keep, cubic=True)
    return spread(values, keep, student.shape[:-1])


def _cosines(x: Tensor) -> Tensor:
    x = unit(x)
    return gram(x)
