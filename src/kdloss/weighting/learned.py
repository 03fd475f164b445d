"""Weights of teachers that are learned from the labels."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.weighting._weighting import Weighting
from kdloss.weighting.scores import of_label


class Learned(Weighting):
    r"""One weight for each teacher, learned from how well the teachers predict the labels.

    $w_k \leftarrow m\,w_k + (1-m)\,\frac{1}{N}\sum_n \frac{w_k\,p_k(y_n)}{\sum_j w_j\,p_j(y_n)}$ in every training
    step: an estimate of the weights that make the labels most likely under the mixture of all teachers. The
    distillation loss doesn't train them, since it would choose the teacher that is easiest to imitate. The weights are
    a buffer, saved with the criterion.

    - `teachers`: the number of teachers.
    - `momentum`: m, the part of the weights that a step keeps, from 0 to 1.

    >>> import kdloss
    >>> learned = kdloss.weighting.Learned(2, momentum=0.9)
    >>> criterion = kdloss.CrossEntropy() + learned * (kdloss.Logits() + kdloss.Logits(teacher=1, name="second"))
    >>> good, bad = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
    >>> loss = criterion(torch.zeros(1, 2, requires_grad=True), [good, bad], torch.tensor([0]))
    >>> learned.weights
    tensor([0.5500, 0.4500])

    Stepwise expectation maximisation: Cappé & Moulines 2009, arXiv:0712.4273.
    """

    weights: Tensor

    def __init__(self, teachers: int, momentum: float = 0.99) -> None:
        super().__init__(of_label, torch.ones_like, name="Learned")
        if teachers < 1:
            raise ValueError(f"Learned weighs one teacher at least, got {teachers}; write Learned(2) for two")
        self.momentum = _checks.fraction("momentum", momentum)
        self.register_buffer("weights", torch.full((teachers,), 1 / teachers))

    def shares(self, scores: Float[Tensor, " teachers *batch"], counted: Tensor | None) -> Tensor:
        """The weights, the same at all positions; in training they are updated with the `scores` where `counted`."""
        if len(scores) != len(self.weights):
            raise ValueError(f"Learned({len(self.weights)}) weighs as many teachers, and {len(scores)} are read")
        weights = self.weights.to(scores.dtype, copy=True)
        if self.training and torch.is_grad_enabled():
            flat, wide = scores.flatten(1), weights.unsqueeze(1)
            known = (wide.log() - flat).softmax(0)
            keep = torch.ones_like(flat[0]) if counted is None else counted.reshape(-1).to(flat.dtype)
            count = keep.sum()
            mean = torch.where(count > 0, (known * keep).sum(1) / count.clamp_min(1), weights)
            self.weights.lerp_(mean.to(self.weights), 1 - self.momentum)
        return weights.reshape(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
