"""Which blocks (select), against which (pair), and where they are (find_blocks)."""

from kdloss.layers.blocks import block_lists, find_blocks, width
from kdloss.layers.layer_map import LayerMap, Name
from kdloss.layers.names import resolve, unwrap
from kdloss.layers.pair import Pairing, pair
from kdloss.layers.select import Layers, select

__all__ = [
    "LayerMap",
    "Layers",
    "Name",
    "Pairing",
    "block_lists",
    "find_blocks",
    "pair",
    "resolve",
    "select",
    "unwrap",
    "width",
]
