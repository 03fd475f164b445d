"""Terms and their weighted sum: each term says what it reads from the models and computes one loss."""

from kdloss.terms.contract import Contract
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.features import Features
from kdloss.terms.logits import Logits
from kdloss.terms.plan import Plan
from kdloss.terms.reads import Reads
from kdloss.terms.step import Step
from kdloss.terms.sum import Sum
from kdloss.terms.task import Task
from kdloss.terms.term import Term

__all__ = ["Contract", "CrossEntropy", "Features", "Logits", "Plan", "Reads", "Step", "Sum", "Task", "Term"]
