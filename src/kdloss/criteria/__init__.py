"""Named sums of terms: `VanillaKD`, `FeatureKD`, `MultiTeacherKD`."""

from kdloss.criteria.feature import FeatureKD
from kdloss.criteria.multi_teacher import MultiTeacherKD
from kdloss.criteria.vanilla import VanillaKD

__all__ = ["FeatureKD", "MultiTeacherKD", "VanillaKD"]
