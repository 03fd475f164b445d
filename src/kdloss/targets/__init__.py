"""What a teacher may hand over in place of its logits."""

from kdloss.targets.mixture import mixture

__all__ = ["mixture"]
