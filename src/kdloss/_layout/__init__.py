"""The meaning of a tensor's axes: stated by a pattern, inferred from modules and shapes, or refused."""

from kdloss._layout.classes import classes_last
from kdloss._layout.decide import Tells, check_batch, decide, standard, width_last
from kdloss._layout.evidence import NOTHING, Evidence, Evident, ends
from kdloss._layout.pattern import Layout, Patterns, read, read_each

__all__ = [
    "NOTHING",
    "Evidence",
    "Evident",
    "Layout",
    "Patterns",
    "Tells",
    "check_batch",
    "classes_last",
    "decide",
    "ends",
    "read",
    "read_each",
    "standard",
    "width_last",
]
