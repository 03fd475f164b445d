"""Modules that remember settings and own trained projections; they own no model."""

from kdloss.criteria.feature import FeatureKD
from kdloss.criteria.multi_teacher import MultiTeacherKD
from kdloss.criteria.vanilla import VanillaKD

__all__ = ["FeatureKD", "MultiTeacherKD", "VanillaKD"]
