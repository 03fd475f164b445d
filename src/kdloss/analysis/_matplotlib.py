"""What draws, imported late."""

from importlib import import_module
from typing import Any

from kdloss._extras import extra


def matplotlib(part: str, what: str) -> Any:
    """A module of matplotlib; `what` needs it."""
    with extra("plot", what):
        return import_module(f"matplotlib.{part}")
