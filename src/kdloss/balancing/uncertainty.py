"""Trained factors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdloss.balancing._balance import Balance


class Uncertainty(Balance):
    r"""Trained factors that give noisy terms smaller weights.

    $\sum_i w_i\,e^{-s_i}\,\ell_i + \frac{1}{2}\sum_i s_i$ with trained $s_i = \log\sigma_i^2$, which start at 0: the
    paper's likelihood of classes with the scale $\sigma_i^2$. For the paper's regression give the term a weight of 1/2.

    The $s_i$ are parameters, one for each term by its name. The optimizer has to hold them (`kdloss.Distillation` has
    them among its parameters); weight decay pulls them to 0.

    >>> import torch, kdloss
    >>> criterion = kdloss.Sum(kdloss.CrossEntropy(), kdloss.Logits(), balance=Uncertainty())
    >>> [name for name, _ in criterion.named_parameters()]
    ['balance.logs.ce', 'balance.logs.kd']

    Kendall, Gal, Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv:1705.07115.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.ParameterDict()

    def build(self, names: Sequence[str]) -> None:
        """Make one parameter, 0, for each of the `names`."""
        self.logs.update({name: nn.Parameter(torch.zeros(())) for name in names})

    def factors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """exp(-s) for each of the `names`."""
        return {name: (-self.logs[name]).exp() for name in names}

    def penalty(self, names: Sequence[str]) -> Tensor:
        """Half the sum of s over the `names`."""
        return torch.stack([self.logs[name] for name in names]).sum() / 2
