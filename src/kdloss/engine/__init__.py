"""Losses on logits in blocks of rows with closed-form gradients, so that memory does not grow with positions."""

from kdloss.engine import closed_forms
from kdloss.engine.divergence import Divergence, any_logits, in_blocks, unblockable
from kdloss.engine.fused import fused, per_position
from kdloss.engine.run import Problem
from kdloss.engine.switch import set_compile
from kdloss.engine.task import LabelTask, Task, TeacherTask, Vocabulary, specification

__all__ = [
    "Divergence",
    "LabelTask",
    "Problem",
    "Task",
    "TeacherTask",
    "Vocabulary",
    "any_logits",
    "closed_forms",
    "fused",
    "in_blocks",
    "per_position",
    "set_compile",
    "specification",
    "unblockable",
]
