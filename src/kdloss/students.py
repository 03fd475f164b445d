"""Smaller models made from a teacher's blocks."""

import copy
import re
from collections.abc import Mapping
from itertools import chain as joined
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdloss._fewer_blocks import fewer_blocks
from kdloss.layers.lists import block_lists
from kdloss.layers.names import unwrap
from kdloss.layers.select import Layers, select

Model = TypeVar("Model", bound=nn.Module)

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
    don't exist, appear twice, or aren't in ascending order, for a model that builds a block otherwise at its new place,
    such as GPT-2 with `scale_attn_by_inverse_layer_idx`, and for one whose weights were rescaled as it ran (RWKV).

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
    _check_around(student, teacher, kept)
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


def _build(teacher: Model, kept: Mapping[str, list[int]], depths: Mapping[str, int]) -> Model:
    """A new model of the teacher's class with fewer blocks, from its configuration as that will be saved and loaded."""
    config: Any = teacher.config
    kind = type(teacher).__name__
    entries = fewer_blocks(kind, config, kept, depths)
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


def _check_around(student: nn.Module, teacher: nn.Module, kept: Mapping[str, list[int]]) -> None:
    """Refuse a teacher that says of itself, outside its blocks, that it is in another state than a new model."""
    every = dict(teacher.named_modules())
    for path, module in student.named_modules():
        if path not in every or any(path.startswith(f"{name}.") for name in kept):
            continue
        for key, new in vars(module).items():
            said = vars(every[path]).get(key, new)
            if isinstance(new, bool) and key[0] != "_" and key not in NOT_COMPARED and said != new:
                raise ValueError(
                    f"{f'{path}.{key}'.lstrip('.')} is {said} in the teacher and {new} in a new model, where the same "
                    "weights may mean something else: keep blocks of the teacher as it was loaded, before it runs"
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
            elif isinstance(value, (bool, int, float, str)) and key[0] != "_" and key not in NOT_COMPARED:
                facts[path, key] = value
    return facts
