"""Smaller models made from a teacher's blocks, and chains of models that teach each other."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain as joined
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdloss.layers.lists import block_lists
from kdloss.layers.names import unwrap
from kdloss.layers.select import Layers, select

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")

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
# A block's attributes that say where it is, and that only its training or its checkpoints need.
NOT_COMPARED = {
    "layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx",
    "training", "gradient_checkpointing",
}  # fmt: skip
INSTEAD = (
    "keep blocks in the pattern of the configuration, for example the first ones, or build the student yourself and "
    "copy the blocks' state_dict"
)


def keep_blocks(teacher: Model, blocks: Layers) -> Model:
    """Build a student of the teacher's class from some of its blocks and everything around them.

    - `teacher`: a Hugging Face model.
    - `blocks`: any selection of `kdloss.layers.select`: "auto", "all", "key", "late", "last", a list of indices or a
      callable. In an encoder-decoder it selects from both stacks, which may have different depths.

    The student's parameters are copies. Its configuration has the kept blocks, also when saved, so that
    `pairing="kept"` can pair each block with the teacher's block just before the next kept one. What the configuration
    says about single blocks (`layer_types`, `mlp_only_layers`, `first_k_dense_replace`, ...) is cut to the kept ones.
    Each block of the student is compared with the block it comes from: the same modules, shapes and attributes.

    Raises: TypeError for a model without a Hugging Face configuration that sets its depth; ValueError for blocks that
    don't exist, appear twice, or aren't in ascending order, and for a model that builds a block otherwise at its new
    place, such as GPT-2 with `scale_attn_by_inverse_layer_idx`.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> teacher = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=8, n_head=2, vocab_size=9))
    >>> student = keep_blocks(teacher, [0, 2, 5])
    >>> student.config.n_layer, student.config.kept_blocks
    (3, {'transformer.h': [0, 2, 5]})

    Sanh et al. 2019, "DistilBERT", arXiv:1910.01108; Sajjad et al. 2023, "On the effect of dropping
    layers of pre-trained transformer models", arXiv:2004.03844.
    """
    config: Any = getattr(teacher, "config", None)
    if config is None or unwrap(teacher) is not teacher:
        raise TypeError(
            f"keep_blocks needs a bare Hugging Face model, got {type(teacher).__name__}; unwrap it, or "
            "build the student yourself and copy the blocks' state_dict"
        )
    lists = block_lists(teacher)
    if len(lists) != 1 and not getattr(config, "is_encoder_decoder", False):
        depths = {name: len(found) for name, found in lists.items()}
        raise ValueError(
            f"{type(teacher).__name__} has {len(lists)} lists of blocks, {depths}; keep_blocks works for models with "
            "one, and for encoder-decoders: build the student yourself and copy the blocks' state_dict"
        )
    stages = [name for name in lists if "*" in name]
    if stages:
        raise TypeError(
            f"the blocks of {type(teacher).__name__} are in stages of several widths, {stages[0]!r}, so "
            "keep_blocks can't leave some out; build a student with fewer blocks in each stage yourself"
        )
    kept = {name: select(blocks, len(found)) for name, found in lists.items()}
    for name, chosen in kept.items():
        if chosen != sorted(chosen):
            raise ValueError(f"blocks of {name} must be in ascending order, got {chosen}")

    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and any(
        c != list(range(len(c))) for c in kept.values()
    ):
        raise ValueError(
            f"scale_attn_by_inverse_layer_idx=True divides attention by a block's place, so {type(teacher).__name__} "
            f"can't keep blocks {kept}; keep the first ones, list(range(n))"
        )
    student = _build(teacher, kept, {name: len(found) for name, found in lists.items()})
    source, target, saved = _tensors(teacher), _tensors(student), student.state_dict()
    origins = {key: _origin(key, source, kept) for key in target}
    _check_tensors({key: x for key, x in target.items() if key in saved or _block(key, kept)}, source, origins)
    if extra := [key for key in teacher.state_dict() if key not in saved and not _block(key, kept)]:
        raise ValueError(f"the student has no {extra[0]}, which the teacher has outside its blocks; {INSTEAD}")
    _check_blocks(student, teacher, origins, kept)
    device = next(teacher.parameters()).device
    for key, tensor in joined(student.named_parameters(), student.named_buffers()):
        tensor.data = tensor.data.to(device, source.get(origins[key], tensor).dtype)
    student.load_state_dict({key: source[origins[key]] for key in saved})
    for key, buffer in student.named_buffers():
        if key not in saved and _block(key, kept) and not torch.equal(buffer, source[origins[key]].to(device)):
            raise ValueError(f"the student's {key} isn't equal to the teacher's {origins[key]}; {INSTEAD}")
    if hasattr(teacher, "generation_config"):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def chain(models: Iterable[Model], train: Callable[[Model, Model], Result]) -> list[Result]:
    r"""Train models one after the other, each with the model before it as the teacher.

    $r_i = \mathrm{train}(m_i, m_{i-1})$ for i = 1, 2, ...; returns the list of $r_i$. A teacher, its assistants and the
    student are a chain, and so are generations of one size (born-again networks).

    - `models`: the models, from a trained teacher to the last student. They are read one by one, so a generator that
      makes or loads them keeps only two in memory at a time.
    - `train`: a function of (student, teacher) that trains the student in place, in any loop, and returns any result.
      An exception ends the chain; the earlier stages stay trained.

    Raises: ValueError for fewer than two models, and for a model that would teach itself; TypeError for one model in
    place of several, and for a `train` that is not a function.

    >>> teacher, assistant, student = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    >>> chain([teacher, assistant, student], lambda student, teacher: teacher is assistant)
    [False, True]

    Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv:1902.03393; Furlanello et al.
    2018, "Born-Again Neural Networks", arXiv:1805.04770.
    """
    if not callable(train):
        raise TypeError(f"train is a function of (student, teacher), got {train!r}; write chain(models, train)")
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        one = type(models).__name__
        raise TypeError(f"chain takes several models, got one {one}; write chain([teacher, ..., student], train)")
    rest = iter(models)
    teacher: Any = next(rest, None)
    results: list[Result] = []
    for student in rest:
        if student is teacher:
            raise ValueError(
                f"model {len(results) + 2} of the chain is the same as the one before it and would be its own teacher; "
                "give each stage a model of its own: [make() for _ in range(3)], not [model] * 3"
            )
        results.append(train(student, teacher))
        teacher = student
    if not results:
        one = "none" if teacher is None else f"one {type(teacher).__name__}"
        raise ValueError(f"a chain is a teacher and at least one student, got {one}; write [teacher, student]")
    return results


def _build(teacher: Model, kept: Mapping[str, list[int]], depths: Mapping[str, int]) -> Model:
    """A new model of the teacher's class with fewer blocks, from its configuration as that will be saved and loaded."""
    config: Any = teacher.config
    kind = type(teacher).__name__
    names = getattr(config, "attribute_map", {})
    counts = {names.get(name, name) for name in DEPTHS}
    entries = config.to_dict()
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
    try:
        smaller = type(config).from_dict(entries)
        smaller._attn_implementation = config._attn_implementation
        student = type(teacher)(smaller)
    except Exception as error:  # each model checks its configuration in its own way
        raise ValueError(f"transformers can't build {kind} with blocks {kept} only: {error}; {INSTEAD}") from error
    built = {name: len(found) for name, found in block_lists(student).items()}
    if built != {name: len(chosen) for name, chosen in kept.items()}:
        raise TypeError(
            f"the configuration of {kind} sets its number of blocks in a way that keep_blocks doesn't know; build the "
            "student yourself and copy the blocks' state_dict"
        )
    return student


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
    if not isinstance(value, list | tuple):
        return value
    if len(value) >= depth and list(value) != list(range(depth)):
        return [value[i] for i in chosen]
    if all(type(i) is int and 0 <= i < depth for i in value):  # a list of blocks
        return [chosen.index(i) for i in value if i in chosen]
    return value


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, also those that aren't saved."""
    return dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()


def _block(key: str, kept: Mapping[str, list[int]]) -> tuple[str, int, str] | None:
    """The list, the index and the rest of a name inside a block."""
    for name in kept:
        if key.startswith(f"{name}."):
            i, _, rest = key.removeprefix(f"{name}.").partition(".")
            return name, int(i), rest
    return None


def _origin(key: str, source: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> str:
    """The teacher's name for a student's tensor: block i of the student is block kept[i]."""
    if (place := _block(key, kept)) is None:
        return key
    name, i, rest = place
    moved = f"{name}.{kept[name][i]}.{rest}"
    if i == 0 and moved not in source:
        # T5 keeps the position bias of all blocks in block 0, whichever block comes first.
        others = [k for k in source if re.fullmatch(rf"{re.escape(name)}\.\d+\.{re.escape(rest)}", k)]
        return key if others == [key] else moved
    return moved


def _check_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], origins: Mapping[str, str]) -> None:
    """Refuse a student with a tensor that the teacher lacks or has in another shape."""
    for key, tensor in target.items():
        origin = origins[key]
        if origin not in source:
            raise ValueError(f"the student's {key} would be the teacher's {origin}, which doesn't exist; {INSTEAD}")
        shape, other = list(tensor.shape), list(source[origin].shape)
        if shape != other:
            raise ValueError(f"the student's {key} has shape {shape}, the teacher's {origin} has {other}; {INSTEAD}")


def _check_blocks(
    student: nn.Module, teacher: nn.Module, origins: Mapping[str, str], kept: Mapping[str, list[int]]
) -> None:
    """Refuse a student with a block that isn't built like the teacher's block whose weights it gets."""
    for name, chosen in kept.items():
        # Where the first block alone has tensors: the modules that hold them, and the modules around those.
        alone = {key.rpartition(".")[0] for key, x in origins.items() if key == x and key.startswith(f"{name}.0.")}
        alone |= {path.rpartition(".")[0] for path in alone}
        first = {
            (path, what): x
            for (path, what), x in _facts(teacher, f"{name}.0").items()
            if f"{name}.0.{path}".rstrip(".") in alone
        }
        for i, theirs in enumerate(chosen):
            expected = _facts(teacher, f"{name}.{theirs}")
            if i == 0:
                expected |= {fact: x for fact, x in first.items() if fact[1] != "class" or fact not in expected}
            built = _facts(student, f"{name}.{i}")
            for path, what in expected | built:
                x, y = built.get((path, what)), expected.get((path, what))
                if x != y:
                    raise ValueError(
                        f"block {i} of the student's {name} is not built like block {theirs} of the teacher's: "
                        f"{f'{path}.{what}'.lstrip('.')} is {x!r}, in the teacher {y!r}; {INSTEAD}"
                    )


def _facts(model: nn.Module, name: str) -> dict[tuple[str, str], Any]:
    """What a block is built from, by path and name: classes, plain attributes, the shapes of parameters and buffers."""
    facts: dict[tuple[str, str], Any] = {}
    for path, module in model.get_submodule(name).named_modules():
        if "drop_path" in path:  # only in training, at a rate that is set by the place among all blocks
            continue
        facts[path, "class"] = type(module).__name__
        for key, value in joined(vars(module).items(), module._parameters.items(), module._buffers.items()):
            if isinstance(value, Tensor):
                facts[path, key] = list(value.shape)
            elif isinstance(value, bool | int | float | str) and key[0] != "_" and key not in NOT_COMPARED:
                facts[path, key] = value
    return facts
