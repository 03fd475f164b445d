"""A weight for each teacher at each position."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from kdloss import _checks

Score = Callable[[Tensor, Tensor], Tensor]


class Weighting(nn.Module):
    r"""A weight for each teacher at each position, which multiplies the terms that read the teacher.

    $w_k = \mathrm{shares}(s_1, \dots, s_K)_k$ with scores $s_k = \mathrm{score}(t_k, y)$; no gradient goes through
    either. Use it in a sum like a number: `weighting * (Logits(teacher=0) + Logits(teacher=1, name="second"))`. Every
    term that it multiplies reads one teacher and gets that teacher's share. The teachers may have different
    architectures and vocabularies. The component "kd/share" is the mean share of the term "kd".

    - `score`: a function of a teacher's logits `[n, V]`, float32 or better, and the labels `[n]`, which returns one
      number per position, `[n]`.
    - `shares`: a function of the scores `[K, ...]`, one entry per teacher in their order, which returns weights of the
      same shape, non-negative and with sum 1 over the first axis.
    - `labels`: whether `score` reads the labels; a step without labels is then refused.
    - `name`: the name in error messages.

    Scores are computed for a block of positions at a time. Where there is no label they are 0 for all teachers. If a
    teacher has no class for a label, it scores log V there, the cross-entropy of a uniform prediction. If `Logits` has
    a `kdloss.TokenMap`, the labels are translated. Soft labels are not classes: only `entropy`, which reads no labels,
    works with them.

    Raises: ValueError for shares of another shape, negative or with another sum; TypeError for a teacher of top-k
    logits, since a score needs the logits of all classes.

    >>> import kdloss
    >>> sure = kdloss.weighting.Weighting(lambda z, y: z.amax(-1), lambda scores: scores.softmax(0))
    >>> terms = kdloss.Logits(teacher=0) + kdloss.Logits(teacher=1, name="second")
    >>> criterion = kdloss.CrossEntropy() + sure * terms
    """

    def __init__(
        self, score: Score, shares: Callable[[Tensor], Tensor], *, labels: bool = True, name: str = "Weighting"
    ) -> None:
        super().__init__()
        _checks.function("score", score, "weighting.of_label")
        _checks.function("shares", shares, "weighting.least")
        self.score, self.labels, self.name = score, labels, name
        self._shares = shares

    def shares(self, scores: Float[Tensor, " teachers *batch"], counted: Tensor | None) -> Tensor:
        """The weights for these `scores`; `counted` is the mask of positions that have a label (None: all)."""
        return self._shares(scores)

    def __repr__(self) -> str:
        return f"kdloss.weighting.{self.name}"
