"""Find a model's blocks (find_blocks), select some (select) and pair student with teacher blocks (pair)."""

from kdloss.layers.attention import pair_by_attention
from kdloss.layers.blocks import find_blocks
from kdloss.layers.emd import pair_by_emd
from kdloss.layers.pair import pair
from kdloss.layers.resolution import pair_by_resolution
from kdloss.layers.select import select

__all__ = [
    "find_blocks",
    "pair",
    "pair_by_attention",
    "pair_by_emd",
    "pair_by_resolution",
    "select",
]
