"""Analysis: how similar the blocks of two models are, and how the loss terms develop over a training."""

from kdloss.analysis.cka import CKAMatrix, cka_matrix
from kdloss.analysis.curve import Curve
from kdloss.analysis.symptoms import Symptom

__all__ = ["CKAMatrix", "Curve", "Symptom", "cka_matrix"]
