"""Distances that compare the examples of a batch, as the papers on images do.

Each is the distance of the same name under `kdloss.distances.between_examples`: every example is one vector, either
a flattened map or pooled features. docs/recipes_images.md lists the papers' weights.

>>> import torch
>>> maps = torch.randn(2, 4, 9, 8)  # student and teacher: 4 images, 9 positions, 8 channels
>>> similarity(*maps).shape, similarity(*maps).unique().numel()
(torch.Size([4, 9]), 4)
"""

from kdloss.distances.between import between_examples
from kdloss.distances.correlation_congruence import correlation_congruence as _correlation_congruence
from kdloss.distances.pkt import pkt as _pkt
from kdloss.distances.rkd_angle import rkd_angle as _rkd_angle
from kdloss.distances.rkd_distance import rkd_distance as _rkd_distance
from kdloss.distances.similarity import similarity as _similarity

similarity = between_examples(_similarity)
rkd_distance = between_examples(_rkd_distance)
rkd_angle = between_examples(_rkd_angle)
pkt = between_examples(_pkt)
correlation_congruence = between_examples(_correlation_congruence)
