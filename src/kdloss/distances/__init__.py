"""Distances between features: `(student [..., D], teacher [..., D]) -> [...]`.

A distance with a `mask` parameter compares positions (rows) with each other. One marked `any_width` needs no
projection. Every distance returns one value for each row, scaled so that the mean over the rows that count is the
published loss.

A distance with trained parameters is a class. It is built as `Distance(student_width, teacher_width)`, with the widths
of the features it will be called with: the models' own widths if the class is marked `any_width`, else the teacher's
width twice, because the student's features are projected first. Options are keyword arguments; set them with
`functools.partial`.
"""

from kdloss.distances import examples
from kdloss.distances.activation_boundary import activation_boundary
from kdloss.distances.attention_mse import attention_mse
from kdloss.distances.attention_transfer import attention_transfer
from kdloss.distances.between import between_examples, between_tokens, tokens
from kdloss.distances.cka import cka
from kdloss.distances.correlation_congruence import correlation_congruence
from kdloss.distances.cosine import cosine
from kdloss.distances.crd import CRD
from kdloss.distances.cwd import cwd
from kdloss.distances.fsp import fsp
from kdloss.distances.layer_norm_mse import layer_norm_mse
from kdloss.distances.mgd import MGD
from kdloss.distances.minilm import minilm
from kdloss.distances.minilm_v2 import minilm_v2
from kdloss.distances.mse import mse
from kdloss.distances.normalized_mse import normalized_mse
from kdloss.distances.nst import nst
from kdloss.distances.pkd import pkd
from kdloss.distances.pkt import pkt
from kdloss.distances.rkd_angle import rkd_angle
from kdloss.distances.rkd_distance import rkd_distance
from kdloss.distances.similarity import similarity
from kdloss.distances.smooth_l1 import smooth_l1
from kdloss.distances.standardized_mse import standardized_mse
from kdloss.distances.vid import VID
from kdloss.distances.word_relation import word_relation

__all__ = [
    "CRD",
    "MGD",
    "VID",
    "activation_boundary",
    "attention_mse",
    "attention_transfer",
    "between_examples",
    "between_tokens",
    "cka",
    "correlation_congruence",
    "cosine",
    "cwd",
    "examples",
    "fsp",
    "layer_norm_mse",
    "minilm",
    "minilm_v2",
    "mse",
    "normalized_mse",
    "nst",
    "pkd",
    "pkt",
    "rkd_angle",
    "rkd_distance",
    "similarity",
    "smooth_l1",
    "standardized_mse",
    "tokens",
    "word_relation",
]
