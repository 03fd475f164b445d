"""A Hugging Face configuration for some of a model's blocks."""

import re
from collections.abc import Collection, Mapping
from typing import Any

# Entries of Hugging Face configurations: numbers of blocks, numbers n of "the first n blocks", and lists about blocks.
DEPTHS = {"num_hidden_layers"} | {
    form.format(stack)
    for form in ("{}_layers", "num_{}_layers", "{}_num_hidden_layers")
    for stack in ("encoder", "decoder")
}
FIRST_BLOCKS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
PER_BLOCK = re.compile(
    r"^(?!mtp_).*(layer|block|attention_window|sliding_windows|indexer_types|num_experts|moe_topk|intermediate_size"
    r"|num_attention_heads|num_key_value_heads|activation_sparsity_pattern|swiglu_limits)"
)


def fewer_blocks(kind: str, config: Any, kept: Mapping[str, list[int]], depths: Mapping[str, int]) -> dict[str, Any]:
    """The entries of a configuration, cut to the `kept` blocks of each list; `depths` are the numbers of blocks.

    Raises: ValueError if a backbone of this `kind` outputs a block that isn't kept.
    """
    names = getattr(config, "attribute_map", {})
    counts = {names.get(name, name) for name in DEPTHS}
    entries: dict[str, Any] = config.to_dict()
    for name, chosen in kept.items():
        for entry, value in entries.items():
            if _is_about(entry, name, only=len(kept) == 1):
                entries[entry] = _cut(entry, value, chosen, depths[name], counts)
    if "attention_types" in entries and "attention_layers" in entries:  # GPT-Neo's runs of [kinds, repetitions]
        entries["attention_types"] = [[[one], 1] for one in entries["attention_layers"]]
    if entries.pop("stage_names", None):  # a backbone's outputs: 0 is the stem, i + 1 is block i; by default the last
        ((name, chosen),) = kept.items()
        places = {0: 0} | {block + 1: i + 1 for i, block in enumerate(chosen)}
        outputs = entries.pop("out_indices"), entries.pop("out_features")
        if outputs[0] != [depths[name]]:
            if lost := [i - 1 for i in outputs[0] if i not in places]:
                raise ValueError(
                    f"{kind} outputs {outputs[1]}, so blocks {lost} must be among those kept, got {chosen}"
                )
            entries["out_indices"] = [places[i] for i in outputs[0]]
    entries["kept_blocks"] = dict(kept)
    return entries


def _is_about(entry: str, stack: str, only: bool) -> bool:
    """Whether an entry of the configuration is about this stack; one that names neither of two is about the encoder."""
    if "decoder" in stack:
        return "decoder" in entry or (only and "encoder" not in entry)
    return "encoder" not in stack or "decoder" not in entry


def _cut(entry: str, value: Any, chosen: list[int], depth: int, counts: Collection[str]) -> Any:
    """An entry of the teacher's configuration for the chosen blocks: whatever it says about each block is cut."""
    if entry in counts and value == depth:
        return len(chosen)
    if entry in FIRST_BLOCKS and value is not None:
        return sum(i < value for i in chosen)
    if not PER_BLOCK.search(entry):
        return value
    if isinstance(value, dict) and all(str(i).isdecimal() for i in value):
        return {str(chosen.index(int(i))): x for i, x in value.items() if int(i) in chosen}
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) >= depth and list(value) != list(range(depth)):
        return [value[i] for i in chosen]
    if all(type(i) is int and 0 <= i < depth for i in value):  # a list of blocks
        return [chosen.index(i) for i in value if i in chosen]
    return value
