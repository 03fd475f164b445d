"""Which blocks (select), against which (pair), and where they are (find_blocks)."""

from kdloss.layers.attention import pair_by_attention
from kdloss.layers.blocks import block_lists, find_blocks, width
from kdloss.layers.emd import pair_by_emd
from kdloss.layers.layer_map import Layer, LayerMap, Name, parts
from kdloss.layers.names import resolve, unwrap
from kdloss.layers.pair import Pairing, learned, pair
from kdloss.layers.resolution import pair_by_resolution
from kdloss.layers.select import Layers, select

__all__ = [
    "Layer",
    "LayerMap",
    "Layers",
    "Name",
    "Pairing",
    "block_lists",
    "find_blocks",
    "learned",
    "pair",
    "pair_by_attention",
    "pair_by_emd",
    "pair_by_resolution",
    "parts",
    "resolve",
    "select",
    "unwrap",
    "width",
]
