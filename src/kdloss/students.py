"""Smaller models made from a teacher's blocks, and chains of models that teach each other."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from kdloss.layers.lists import block_lists
from kdloss.layers.names import unwrap
from kdloss.layers.select import Layers, select

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")


def keep_blocks(teacher: Model, blocks: Layers) -> Model:
    """Build a student of the teacher's class from some of its blocks and everything around them.

    - `teacher`: a Hugging Face model.
    - `blocks`: any selection of `kdloss.layers.select`: "auto", "all", "key", "late", "last", a list of indices or a
      callable. In an encoder-decoder it selects from both stacks.

    The student's parameters are copies. Its configuration has the kept blocks, also when saved, so that
    `pairing="kept"` can pair each block with the teacher's block just before the next kept one.

    Raises: TypeError for a model without a Hugging Face configuration that sets its depth; ValueError for blocks that
    don't exist, appear twice, or aren't in ascending order.

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

    student = type(teacher)(_smaller(config, kept))
    if {name: len(found) for name, found in block_lists(student).items()} != {
        name: len(chosen) for name, chosen in kept.items()
    }:
        raise TypeError(
            f"the configuration of {type(teacher).__name__} sets its number of blocks in a way that "
            "keep_blocks doesn't know; build the student yourself and copy the blocks' state_dict"
        )
    source, target = teacher.state_dict(), student.state_dict()
    student.load_state_dict({key: _origin(key, source, kept) for key in target})
    if hasattr(teacher, "generation_config"):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    example = next(teacher.parameters())
    return student.to(device=example.device, dtype=example.dtype).train(teacher.training)


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


def _smaller(config: Any, kept: Mapping[str, list[int]]) -> Any:
    """The teacher's configuration for fewer blocks; a list with one entry per block is cut the same way."""
    config = copy.deepcopy(config)
    depths = [len(chosen) for chosen in kept.values()]
    first = next(iter(kept.values()))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[i] for i in first]
    config.num_hidden_layers = depths[0]
    if len(depths) > 1:
        config.num_decoder_layers = depths[1]
    config.kept_blocks = dict(kept)
    return config


def _origin(key: str, source: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> Tensor:
    """The teacher's tensor for a student's key: block i of the student is block kept[i]."""
    for name, chosen in kept.items():
        if key.startswith(f"{name}."):
            i, _, rest = key.removeprefix(f"{name}.").partition(".")
            # T5 keeps the position bias of all blocks in block 0, whichever block comes first.
            moved = f"{name}.{chosen[int(i)]}.{rest}"
            return source[moved if moved in source else key]
    return source[key]
