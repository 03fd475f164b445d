"""What a teacher, or a student, may hand over in place of its logits."""

from kdloss.targets.lazy import LazyLogits
from kdloss.targets.mixture import Mixture
from kdloss.targets.sharded import ShardedLogits
from kdloss.targets.top_k import TopKLogits
from kdloss.targets.vocabulary import TokenMap, truncate

__all__ = [
    "LazyLogits",
    "Mixture",
    "ShardedLogits",
    "TokenMap",
    "TopKLogits",
    "truncate",
]
