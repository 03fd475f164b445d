"""Capture what modules, chosen by name, return during one forward pass."""

from kdloss._capture.compiled import eagerly
from kdloss._capture.hooks import capture, record
from kdloss._capture.located import Located
from kdloss._capture.recorder import Captured, Request, Which
from kdloss._capture.take import Take

__all__ = ["Captured", "Located", "Request", "Take", "Which", "capture", "eagerly", "record"]
