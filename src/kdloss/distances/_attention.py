"""Attention relations between the positions of a text, from concatenated query, key and value projections."""

import torch
from einops import rearrange
from torch import Tensor

from kdloss import _checks
from kdloss.distances._rows import full_mask, prepare_rows, product
from kdloss.divergences import forward_kl


def projections(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, heads: int, parts: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both sides as `[parts, B, heads, N, d]` (query, key, value), and the mask `[B, N]` (None: all)."""
    s, t, keep = prepare_rows(name, student, teacher, mask, least=1)
    _checks.heads(name, heads, parts, s.shape[-1], t.shape[-1])
    split = [rearrange(x, "b n (p h d) -> p b h n d", p=parts, h=heads) for x in (s, t)]
    return split[0], split[1], keep


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Scaled dot products `[..., N, N]`, before any softmax."""
    scale: float = queries.shape[-1] ** -0.5
    return product(queries, keys) * scale


def visible_keys(keep: Tensor, causal: bool) -> Tensor:
    """The keys that each query sees, `[B, 1, N, N]`: those that count, and no later ones if causal."""
    sees = keep.unsqueeze(-1) & keep.unsqueeze(-2)
    return (sees.tril() if causal else sees).unsqueeze(1)


def kl_of_relations(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], keep: Tensor | None, causal: bool
) -> Tensor:
    """KL(teacher || student) of each query's attention distribution, mean over the heads, `[B, N]`."""
    s, t = scores(*student), scores(*teacher)
    if causal or keep is not None:
        keep = full_mask(keep, s[:, 0])
        unseen = ~visible_keys(keep, causal) & keep[:, None, :, None]
        s, t = s.masked_fill(unseen, -torch.inf), t.masked_fill(unseen, -torch.inf)
    return forward_kl(s, t).mean(1) if s.numel() else s.sum(-1).mean(1)
