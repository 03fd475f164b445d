"""The kinds of logits: what a teacher or a student may give in place of a tensor."""

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
