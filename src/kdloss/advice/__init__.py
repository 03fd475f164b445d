"""Choose a method and its settings for two models: the guide as a function."""

from kdloss.advice.advice import Advice, suggest

__all__ = ["Advice", "suggest"]
