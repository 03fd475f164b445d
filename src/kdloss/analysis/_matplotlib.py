"""Import matplotlib only when something is drawn."""

from importlib import import_module
from typing import Any

from kdloss._extras import extra


def matplotlib(part: str, what: str) -> Any:
    """Import a module of matplotlib; `what` is named in the error if it is missing."""
    with extra("plot", what):
        return import_module(f"matplotlib.{part}")
