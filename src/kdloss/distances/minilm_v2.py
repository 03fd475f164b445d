"""MiniLMv2: self-attention relations of queries, keys and values."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._attention import kl_of_relations, projections
from kdloss.distances._rows import any_width, spread


@any_width
def minilm_v2(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    relation_heads: int,
    parts: int = 3,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""KL of the relations among queries, among keys and among values, for every position.

    $\sum_{X \in \{Q, K, V\}} \frac{1}{r} \sum_a \mathrm{KL}(R^t_{Xai} \,\|\, R^s_{Xai})$ with $R_{Xa} =
    \mathrm{softmax}(X_a X_a^\top / \sqrt{d_r})$. The vectors of all heads are concatenated and split again
    into r = `relation_heads` of width $d_r$. Its mean over the positions i is the paper's loss with weight 1 for
    each of the three relations. The number of attention heads may differ between student and teacher, and so may the
    widths. The paper uses 48 relation heads (64 for large teachers), the student's last block and, for a large
    teacher, an upper-middle block.

    `student` and `teacher` are the concatenated query, key and value projections, `[Q, K, V]`: see `minilm`.
    With `parts=1` they are one of these alone. Grouped-query attention has keys and values that are narrower than
    its queries: there, sum three calls. Set `causal=True` for decoders: every position then sees itself and earlier
    ones. Rotary embeddings are applied after the projections, so relations depend on the content alone.

    Shapes: student `[..., N, parts·D]` and teacher `[..., N, parts·D']`, mask `[..., N]` (True = counts).
    Returns `[..., N]` in nats, in float32 or better. The teacher is detached.

    Raises: ValueError for widths that relation heads don't divide, for positions or devices that differ, and for
    features that are not `[..., N, D]`; TypeError for integer features.

    >>> import torch
    >>> student, teacher = torch.randn(2, 5, 3 * 8), torch.randn(2, 5, 3 * 12)
    >>> minilm_v2(student, teacher, relation_heads=4).shape
    torch.Size([2, 5])

    Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", arXiv:2012.15828.
    """
    s, t, keep = projections("minilm_v2", student, teacher, mask, relation_heads, parts)
    relations = [kl_of_relations((x, x), (y, y), keep, causal) for x, y in zip(s, t, strict=True)]
    return spread(torch.stack(relations).sum(0), keep, student.shape[:-1])
