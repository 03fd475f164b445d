"""Both sides of a divergence in log space."""

from torch import Tensor

from kdloss import _checks
from kdloss.reduction import precise


def log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Checked log-probabilities of student and detached teacher at a temperature."""
    _checks.temperature(temperature)
    _checks.logits(student, teacher)
    return _log_softmax(student, temperature), _log_softmax(teacher.detach(), temperature)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = precise(logits)
    if temperature != 1:
        # The maximum leaves before the division, which then rounds small numbers, not large ones.
        logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return logits.log_softmax(-1)
