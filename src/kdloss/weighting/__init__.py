"""Weights of teachers, computed from their predictions or drawn at random."""

from kdloss.weighting._drawn import drawn
from kdloss.weighting._weighting import Weighting
from kdloss.weighting.learned import Learned
from kdloss.weighting.scores import confidence, entropy, least, of_entropy, of_label

__all__ = ["Learned", "Weighting", "confidence", "drawn", "entropy", "least", "of_entropy", "of_label"]
