"""MiniLM: attention distributions and value relations."""

from jaxtyping import Bool, Float
from torch import Tensor

from kdloss.distances._attention import kl_of_relations, projections
from kdloss.distances._rows import any_width, spread


@any_width
def minilm(
    student: Float[Tensor, "*batch rows student_width"],
    teacher: Float[Tensor, "*batch rows teacher_width"],
    *,
    heads: int,
    mask: Bool[Tensor, "*batch rows"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "*batch rows"]:
    r"""KL of the attention distributions plus KL of the value relations, for every query.

    $\frac1h \sum_a \mathrm{KL}(A^t_{ai} \,\|\, A^s_{ai}) + \frac1h \sum_a \mathrm{KL}(R^t_{ai} \,\|\,
    R^s_{ai})$ with $A_a = \mathrm{softmax}(Q_a K_a^\top / \sqrt d)$, $R_a = \mathrm{softmax}(V_a V_a^\top /
    \sqrt d)$ for each of h heads. Its mean over the queries i is the paper's $L_{AT} + L_{VR}$. The paper
    uses the last block of both models: `layers="last"`.

    `student` and `teacher` are the query, key and value projections concatenated along the width,
    `[Q, K, V]`, each with its heads side by side. GPT-2's `c_attn` has this form; elsewhere write
    `torch.cat([query, key, value], -1)` of what `kdloss.capture` recorded. (GPT-NeoX's and BLOOM's
    `query_key_value` is ordered by heads first: rearrange it.) No model has to return attention maps, so
    fused attention works. Set `causal=True` for decoders: every position then sees itself and earlier ones.
    Rotary embeddings are applied after the projections, so this attention depends on the content and not on
    the positions.

    Shapes: student `[..., N, 3·D]` and teacher `[..., N, 3·D']` (widths may differ, the number of `heads` must
    be equal: else see `minilm_v2`), mask `[..., N]` (True = counts, as query and as key). Returns
    `[..., N]` in nats, in float32 or better. The teacher is detached.

    Raises: ValueError for widths that heads don't divide, for positions or devices that differ, and for
    features that are not `[..., N, D]`; TypeError for integer features.

    >>> import torch
    >>> student, teacher = torch.randn(2, 5, 3 * 8), torch.randn(2, 5, 3 * 12)
    >>> minilm(student, teacher, heads=4).shape
    torch.Size([2, 5])

    Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
    Transformers", arXiv:2002.10957.
    """
    s, t, keep = projections("minilm", student, teacher, mask, heads, parts=3)
    attention = kl_of_relations((s[0], s[1]), (t[0], t[1]), keep, causal)
    values = kl_of_relations((s[2], s[2]), (t[2], t[2]), keep, causal)
    return spread(attention + values, keep, student.shape[:-1])
