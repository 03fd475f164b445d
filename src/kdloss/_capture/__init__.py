"""Names in, outputs out: what chosen modules return during one forward pass."""

from kdloss._capture.hooks import capture
from kdloss._capture.recorder import Captured, Which
from kdloss._capture.take import Take

__all__ = ["Captured", "Take", "Which", "capture"]
