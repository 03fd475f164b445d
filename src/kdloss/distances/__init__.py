"""Features against features: `(student [..., D], teacher [..., D]) -> [...]`."""

from kdloss.distances.cosine import cosine
from kdloss.distances.layer_norm_mse import layer_norm_mse
from kdloss.distances.mse import mse
from kdloss.distances.normalized_mse import normalized_mse

__all__ = ["cosine", "layer_norm_mse", "mse", "normalized_mse"]
