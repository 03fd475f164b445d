"""The base class of all balances."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Balance(nn.Module):
    """Factors of a sum's terms, beside their weights: `kdloss.Sum(*terms, balance=...)`.

    To write a balance of your own, inherit from this class. Its parameters are trained, and parameters and buffers are
    saved with the criterion. The component "kd/balance" is the factor of the term "kd".

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
        """Make parameters and buffers for terms of these `names`; the sum calls it once."""

    def factors(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """One factor of 0 or more for each term of these `names`; called before the models run."""
        raise NotImplementedError(f"{type(self).__name__} gives no factors: define factors(self, names)")

    def penalty(self, names: Sequence[str]) -> Tensor | None:
        """A number to add to the loss, for the terms of these `names`; None adds nothing."""
        return None

    def seen(self, means: Mapping[str, Tensor]) -> None:
        """Get the terms' `means` of a step, by name and detached; called only in training."""
