"""The guide to choosing as a function."""

from kdloss.advice.advice import Advice, suggest

__all__ = ["Advice", "suggest"]
