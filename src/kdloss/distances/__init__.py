"""Features against features: `(student [..., D], teacher [..., D]) -> [...]`.

A distance with a parameter `mask` compares positions (rows) with each other; one marked `any_width` needs
no projection. Each row's value is such that the mean over the rows that count is the published loss.

A distance with parameters is a class, built as `Distance(student_width, teacher_width)` for the widths of
the features it will be called with: the models' own if the class is marked `any_width`, else both are the
teacher's, where the student's features come projected. Options are keywords (`functools.partial`).
"""

from kdloss.distances.attention_mse import attention_mse
from kdloss.distances.attention_transfer import attention_transfer
from kdloss.distances.between import between_examples, between_tokens, tokens
from kdloss.distances.cka import cka
from kdloss.distances.cosine import cosine
from kdloss.distances.crd import CRD
from kdloss.distances.layer_norm_mse import layer_norm_mse
from kdloss.distances.mgd import MGD
from kdloss.distances.minilm import minilm
from kdloss.distances.minilm_v2 import minilm_v2
from kdloss.distances.mse import mse
from kdloss.distances.normalized_mse import normalized_mse
from kdloss.distances.similarity import similarity
from kdloss.distances.vid import VID

__all__ = [
    "CRD",
    "MGD",
    "VID",
    "attention_mse",
    "attention_transfer",
    "between_examples",
    "between_tokens",
    "cka",
    "cosine",
    "layer_norm_mse",
    "minilm",
    "minilm_v2",
    "mse",
    "normalized_mse",
    "similarity",
    "tokens",
]
