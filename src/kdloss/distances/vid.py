"""Variational information distillation (VID)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdloss import _checks
from kdloss.distances._features import features


class VID(nn.Module):
    r"""Negative log-likelihood of the teacher's features, a Gaussian around the student's with a learned variance.

    $\frac1D \sum_d \tfrac12 \left( \frac{(s_d - t_d)^2}{\sigma_d^2} + \log \sigma_d^2 \right)$ with
    $\sigma_d^2 = \log(1 + e^{\alpha_d}) + \epsilon$, one variance for each channel. This is the authors' code,
    which leaves out the constant $\tfrac12 \log 2\pi$ and averages over channels where the paper sums. It is the
    negative of a lower bound of the information that student and teacher share, so it may be negative, and it is
    not 0 at the teacher. Channels that the student can't predict get a large variance and a small gradient.
    `FeatureKD`'s projection predicts the mean. `variance` is the initial $\sigma^2$ (5, as in the authors' code),
    and `eps` is $\epsilon$, the smallest variance.

    Build it as `VID(student_width, teacher_width)` with the widths of the features it is called with; they are equal,
    after the projection. Shapes: student and teacher `[..., D]`. Returns `[...]`, in float32 or better. The teacher
    is detached. The variances are parameters: give them to the optimizer.

    Raises: ValueError for widths, shapes or devices that differ; TypeError for integer features.

    >>> features = torch.zeros(2, 3)
    >>> VID(3, 3, variance=math.e)(features, features)  # log(e) / 2
    tensor([0.5000, 0.5000], grad_fn=<DivBackward0>)

    Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", arXiv:1904.05835, and
    their code.
    """

    def __init__(self, student_width: int, teacher_width: int, *, variance: float = 5.0, eps: float = 1e-5) -> None:
        super().__init__()
        width = _checks.one_width("VID", student_width, teacher_width)
        if not variance > eps:
            raise ValueError(f"variance must be above eps={eps}, got {variance!r}")
        self.eps = eps
        alpha = variance - eps + math.log(-math.expm1(eps - variance))
        self.alpha = nn.Parameter(torch.full((width,), alpha))

    def forward(
        self, student: Float[Tensor, "*batch width"], teacher: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch"]:
        """The value at every position; see the class."""
        student, teacher = features(student, teacher)
        variance = F.softplus(self.alpha.to(student.dtype)) + self.eps
        return ((student - teacher).square() / variance + variance.log()).mean(-1) / 2
