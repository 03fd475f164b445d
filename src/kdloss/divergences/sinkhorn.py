"""Sinkhorn divergence: optimal transport between classes."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kdloss import _checks
from kdloss.divergences._log_probs import log_probs
from kdloss.engine import any_logits, transport
from kdloss.reduction import precise, widest


@any_logits(transport.sinkhorn, needs_classes=True)
def sinkhorn(
    student: Float[Tensor, "*batch vocab"],
    teacher: Float[Tensor, "*batch vocab"],
    *,
    cost: Float[Tensor, "vocab vocab"],
    temperature: float = 1.0,
    epsilon: float = 0.1,
    iterations: int = 100,
    t_squared: bool = True,
) -> Float[Tensor, "*batch"]:
    r"""Debiased optimal transport at every position: the cost of moving the student's mass to the teacher's classes.

    $T^2 (W(q, p) - \frac12 W(q, q) - \frac12 W(p, p))$ with
    $W(q, p) = \min_\pi \sum_{uv} \pi_{uv} c_{uv} + \epsilon\,\mathrm{KL}(\pi\,\|\,q \otimes p)$ over all $\pi \geq 0$
    with row sums q and column sums p; $p = \mathrm{softmax}(t/T)$ the teacher,
    $q = \mathrm{softmax}(s/T)$ the student. A mistake costs more, the farther apart the two classes are. For small
    epsilon it is the Wasserstein distance, for large epsilon a kernel distance. It is always finite. WKD-L is the first
    term, W(q, p), alone; neither that nor its gradient is 0 where student and teacher are equal.

    - `cost`: the cost of moving one unit of mass from class to class, `[V, V]`; set it by `functools.partial`. It must
      be finite, 0 on the diagonal and symmetric, and exp(-cost / epsilon) must be positive semi-definite, or this is
      no divergence. Distances of class embeddings and their squares fulfil this, also on a line or a sphere.
    - `epsilon`: in units of the cost. Below a tenth of the largest cost, use more `iterations`.
    - `iterations`: the number of over-relaxed Sinkhorn iterations, in float64. The gradient comes from the potentials
      and is that of the limit of many iterations; only second derivatives go through the iterations.

    Time and memory grow with iterations times V² for each position, so use it for up to a few hundred classes.

    Shapes: student and teacher logits `[..., V]`. Returns `[...]`, in float32 or better. The teacher is detached.
    `t_squared=False` leaves out the factor T², which keeps the gradient's size as T changes.

    Raises: ValueError for a cost that is not as described, an epsilon or temperature that is not finite and positive,
    or shapes, vocabularies or devices that differ; TypeError for integer logits or costs.

    >>> import torch
    >>> from functools import partial
    >>> places = torch.arange(3.0)
    >>> ordinal = partial(sinkhorn, cost=(places - places[:, None]).abs(), epsilon=0.1)
    >>> teacher = torch.tensor([0.0, 99.0, 0.0])
    >>> ordinal(torch.tensor([99.0, 0.0, 0.0]), teacher)  # one place away
    tensor(1.)

    Lv, Yang, Li 2024, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
    arXiv:2412.08139; debiased: Feydy et al. 2019, "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences", arXiv:1810.08278.
    """
    _checks.logits(student, teacher)
    transport.check(student, cost, epsilon, iterations)
    dtype = torch.promote_types(precise(student).dtype, precise(teacher).dtype)
    wide = widest(student.device)
    log_q, log_p = log_probs(student.to(wide), teacher.to(wide), temperature)
    values = _value(log_q, log_p, cost.detach(), epsilon, iterations)
    return (values * temperature**2 if t_squared else values).to(dtype)


class _Debiased(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor, cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
        return transport.debiased(log_q, log_p, cost, epsilon, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.epsilon, ctx.iterations = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        *tensors, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # the slope again, with its own derivatives
            log_q, log_p, cost = tensors
            slope = transport.debiased(log_q, log_p, cost, ctx.epsilon, ctx.iterations)[1]
        return upstream.unsqueeze(-1) * slope, None, None, None, None


def _meta(log_q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return log_q.new_empty(log_q.shape[:-1]), torch.empty_like(log_q)


# One operator, since compilers would trace every iteration; torch.library.custom_op would import the compiler.
_library: Any = torch.library.Library("kdloss", "DEF")  # type: ignore[no-untyped-call]
_library.define("sinkhorn(Tensor log_q, Tensor log_p, Tensor cost, float epsilon, int iterations) -> (Tensor, Tensor)")
_library.impl("sinkhorn", transport.debiased, "CompositeExplicitAutograd")
_library.impl("sinkhorn", _meta, "Meta")


def _value(log_q: Tensor, *args: Any) -> Tensor:
    """Apply the function with its own slope; under a compiler both come from one operator."""
    if not torch.compiler.is_compiling():
        value: Tensor = _Debiased.apply(log_q, *args)[0]  # type: ignore[no-untyped-call]
        return value
    with torch.no_grad():
        value, slope = torch.ops.kdloss.sinkhorn(log_q, *args)
    here = log_q.masked_fill(log_q == -torch.inf, 0)
    number: Tensor = value + (slope * (here - here.detach())).sum(-1)
    return number
