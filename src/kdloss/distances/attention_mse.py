"""TinyBERT's attention loss: mean squared error of the attention scores."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._attention import projections, scores, visible_keys
from kdloss.distances._features import mean, squared_gap
from kdloss.distances._rows import any_width, at_least_one, full_mask, spread


@any_width
def attention_mse(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    heads: int,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""Mean squared error of the attention scores before their softmax, for every query.

    $\frac1h \sum_a \frac1N \sum_j (A^s_{aij} - A^t_{aij})^2$ with $A_a = Q_a K_a^\top / \sqrt{d}$, h heads
    of width d. Its mean over the queries i is the paper's mean of MSEs. The authors' code also counts
    padding, whose scores it sets to 0; here padded keys and queries do not count. `causal=True` is for
    decoders, which the paper does not treat: it leaves out the keys after each query and takes the mean over
    the remaining keys.

    `student` and `teacher` are the query and key projections concatenated along the width, `[Q, K]`, each
    with its heads side by side, as models compute them: `torch.cat([query, key], -1)` of what
    `kdloss.capture` recorded. No model has to return attention maps, so fused attention works. Rotary
    embeddings are applied after the projections, so these scores depend on the content and not on the positions.

    The paper's embedding loss is `mse` on the embedding layers, and its hidden loss is `mse` on the blocks, both
    with `FeatureKD`'s projection. If a model returns attention maps `[B, heads, T, T]`, `FeatureKD` reads them as
    maps whose channels are the heads: `mse` with a `feature_mask` of pairs `[B, T, T]` has this form.

    Shapes: student `[..., N, 2·D]` and teacher `[..., N, 2·D']` (widths may differ, the number of heads must
    be equal), mask `[..., N]` (True = counts). Returns `[..., N]`, in float32 or better. The teacher is
    detached.

    Raises: ValueError for widths that heads don't divide, for positions or devices that differ, and for
    features that are not `[..., N, D]`; TypeError for integer features.

    >>> import torch
    >>> queries, keys = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [4.0]])
    >>> attention_mse(torch.cat([queries, keys], -1), torch.zeros(2, 2), heads=1)  # (4 + 16) / 2
    tensor([10.,  0.])

    Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351.
    """
    s, t, keep = projections("attention_mse", student, teacher, mask, heads, parts=2)
    gaps = squared_gap(scores(*s), scores(*t))
    if causal or keep is not None:
        keys = visible_keys(full_mask(keep, gaps[:, 0]), causal)
        gaps = gaps.masked_fill(~keys, 0).sum(-1) / at_least_one(keys.sum(-1))
    else:
        gaps = mean(gaps)
    values = gaps.mean(1)
    return spread(values, keep, student.shape[:-1])
