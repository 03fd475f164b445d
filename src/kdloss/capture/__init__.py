"""Names in, outputs out: what chosen modules return during one forward pass."""

from kdloss.capture.hooks import capture
from kdloss.capture.recorder import Captured, Which
from kdloss.capture.take import Take

__all__ = ["Captured", "Take", "Which", "capture"]
