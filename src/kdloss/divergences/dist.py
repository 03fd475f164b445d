"""DIST: correlations between classes and between examples instead of equal probabilities."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits
from kdloss.reduction import fill, precise, widest


@any_logits(needs_classes=True)
def dist(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    mask: Bool[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""One minus the correlation with the teacher, within each position and within each class.

    $T^2 (\beta\,(1 - \rho(q_{i\cdot}, p_{i\cdot})) + \gamma\,\frac1V\sum_v (1 - \rho(q_{\cdot v},
    p_{\cdot v})))$ with $\rho$ Pearson's correlation, over classes (inter-class) and over the positions that count
    (intra-class, the same number for every position); $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. The factor T² is in the authors' code, too; `t_squared=False` leaves it
    out. It is computed as half the squared distance of unit vectors: 0 at the teacher, and 1/2 where one of the two
    is constant (its norm is below 1e-8) and so correlates with nothing.

    Shapes: student and teacher logits `[..., V]`, mask `[...]` (True = counts). Returns `[...]`, in float32
    or better, 0 where the mask is False. The teacher is detached. It compares positions with each other. So
    micro-batches don't add up to one batch, and all positions are computed at once. A top-k teacher needs
    `tail="uniform"`, since its slots are other classes at each position.

    Raises: ValueError for a single position with gamma > 0, a temperature that is not finite and positive,
    or shapes, vocabularies or devices that differ; TypeError for integer logits.

    >>> teacher = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    >>> dist(teacher, teacher)
    tensor([0., 0.])

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536.
    """
    _checks.weight("beta", beta)
    _checks.weight("gamma", gamma)
    positions = student.shape[:-1]
    if gamma > 0 and positions.numel() == 1:
        raise ValueError("dist compares positions with each other, and there is one; write gamma=0")
    _checks.logits(student, teacher)
    dtype = torch.promote_types(precise(student).dtype, precise(teacher).dtype)
    if mask is not None:
        _checks.mask(mask, positions, "positions")
        student, teacher = fill(student, mask), fill(teacher, mask)
    # In float64: where classes hardly vary, differences of probabilities need more digits than float32 has.
    wide = widest(student.device)
    log_q, log_p = log_probs(student.to(wide), teacher.to(wide), temperature)
    q, p = log_q.exp(), log_p.exp()
    keep = q.new_ones(positions) if mask is None else mask.to(q.dtype)
    values = beta * _decorrelation(q, p, torch.ones_like(q))
    if gamma > 0:
        columns = [x.reshape(-1, x.shape[-1]).T for x in (q, p, keep.unsqueeze(-1).expand_as(q))]
        values = values + gamma * _decorrelation(*columns).mean()
    values = fill(values, mask).to(dtype)
    return values * temperature**2 if t_squared else values


def _decorrelation(a: Tensor, b: Tensor, keep: Tensor) -> Tensor:
    """1 - Pearson's correlation along the last dimension, as half the squared distance of unit vectors."""
    return (_unit(a, keep) - _unit(b, keep)).square().sum(-1) / 2


def _unit(x: Tensor, keep: Tensor, eps: float = 1e-8) -> Tensor:
    mean = (x * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_min(1)
    x = (x - mean) * keep
    return x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt()
