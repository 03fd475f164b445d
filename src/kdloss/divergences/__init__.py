"""Logits against logits: `(student [..., V], teacher [..., V], temperature=T) -> [...]`."""

from kdloss.divergences.forward_kl import forward_kl
from kdloss.divergences.reverse_kl import reverse_kl

__all__ = ["forward_kl", "reverse_kl"]
