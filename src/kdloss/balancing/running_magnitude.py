"""Factors that bring all terms to one size."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdloss import _checks
from kdloss.balancing._balance import Balance


class RunningMagnitude(Balance):
    r"""Scales every term to the size of the first, so that the weights are the terms' contributions to the loss.

    $f_i = m_1 / m_i$, where $m_i$ is the running mean of $|\ell_i|$ over earlier training steps:
    $m_i \leftarrow \mu\,m_i + (1-\mu)\,|\ell_i|$, starting at the first value.

    - `momentum`: $\mu$, from 0 to 1.

    There are no earlier values in the first step, so only the first term counts in it. A term that a schedule turns on
    later counts from its second step on. The running means are a buffer, saved with the criterion.

    >>> import torch, kdloss
    >>> criterion = kdloss.Sum(kdloss.CrossEntropy(), kdloss.Logits(), balance=RunningMagnitude())
    >>> student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[9.0, 0.0]])
    >>> losses = [criterion(student, teacher, torch.tensor([0])).item() for _ in range(2)]
    >>> [round(loss, 4) for loss in losses]  # log 2, then twice that: once by the labels, once by the teacher
    [0.6931, 1.3863]
    """

    magnitudes: Tensor

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = _checks.fraction("momentum", momentum)
        self.names: list[str] = []

    def build(self, names: Sequence[str]) -> None:
        """Make one running mean for each of the `names`; it is NaN until the term was seen."""
        self.names = list(names)
        self.register_buffer("magnitudes", torch.full((len(names),), torch.nan))

    def factors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """The first term's size over that of each of the `names`."""
        first = self.magnitudes[self.names.index(names[0])]
        ratios = (first / self.magnitudes.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(0.0)
        found = {name: ratios[self.names.index(name)] for name in names}
        return found | {names[0]: torch.ones_like(first)}

    def seen(self, means: Mapping[str, Tensor]) -> None:
        """Update the running means with the terms' `means`."""
        for name, mean in means.items():
            running = self.magnitudes[self.names.index(name)]
            size = mean.abs().to(running)
            after = torch.where(running.isnan(), size, running.lerp(size, 1 - self.momentum))
            running.copy_(after.where(size > 0, running))
