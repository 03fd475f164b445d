"""The slot for balancing in a sum."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Balance(nn.Module):
    """Factors of a sum's terms, beside their weights: `kdloss.Sum(*terms, balance=...)`.

    A balance of your own is a subclass. Its parameters are trained, its buffers saved, with the criterion. The
    component "kd/balance" is the factor of the term "kd".

    >>> import torch, kdloss
    >>> class Halved(Balance):
    ...     def factors(self, names):
    ...         return {name: torch.tensor(0.5) for name in names}
    >>> criterion = kdloss.Sum(kdloss.CrossEntropy(), balance=Halved())
    >>> criterion(torch.zeros(2, 4), labels=torch.tensor([0, 1]))  # half of log 4
    tensor(0.6931)
    """

    def __init__(self) -> None:
        super().__init__()

    def build(self, names: Sequence[str]) -> None:
        """Make what is trained or remembered, for terms of these `names`; called once by the sum."""

    def factors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """One number of 0 or more for each of the terms of these `names`, known before the models run."""
        raise NotImplementedError(f"{type(self).__name__} balances nothing: define factors(self, names)")

    def penalty(self, names: Sequence[str]) -> Tensor | None:
        """What is added to the loss of the terms of these `names`, one number for all positions; None for nothing."""
        return None

    def seen(self, means: Mapping[str, Tensor]) -> None:
        """The terms' `means` in a step by name, detached; called in training alone."""
