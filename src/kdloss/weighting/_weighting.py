"""A weight for each teacher at each position."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from kdloss import _checks

Score = Callable[[Tensor, Tensor], Tensor]


class Weighting(nn.Module):
    r"""A weight for each teacher at each position, which multiplies the terms that read the teacher.

    $w_k = \mathrm{shares}(s_1, \dots, s_K)_k$ of scores $s_k = \mathrm{score}(t_k, y)$, no gradient in either. It
    stands in a sum as a number does, `weighting * (Logits(teacher=0) + Logits(teacher=1, name="second"))`: every
    term it multiplies reads one teacher, and gets that teacher's share. Teachers may differ in all they have. The
    component "kd/share" is the mean share of the term "kd".

    - `score`: of a teacher's logits `[n, V]`, float32 or better, and the labels `[n]`: one number each, `[n]`.
    - `shares`: of scores `[K, ...]`, the teachers in their order: weights of the same shape, non-negative and of sum
      1 over the first axis.
    - `labels`: whether `score` reads the labels, so that a step without any is refused. `name`: what errors call it.

    Scores are made of a block of positions at a time. Where no label stands they are 0 for all teachers. A
    label that a teacher has no class for costs it log V, as if it knew nothing; where `Logits` has a `kdloss.TokenMap`,
    labels are translated. Soft labels are no classes, and `entropy` alone weighs by none.

    Raises: ValueError for shares of another shape, negative or of another sum; TypeError for a teacher of top-k logits,
    which don't tell what is asked.

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
        """The weights for these scores; `counted` says where labels stand (None: everywhere)."""
        return self._shares(scores)

    def __repr__(self) -> str:
        return f"kdloss.weighting.{self.name}"
