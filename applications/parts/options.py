"""The settings that these scripts share, a dataclass for each kind; every setting is a flag, by tyro."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from typing_extensions import Doc
from tyro.constructors import PrimitiveConstructorSpec

import kdloss

# They make or help losses, or need more than a choice.
HELPERS = {
    "between_examples", "between_tokens", "examples", "sinkhorn", "standardized", "tokens", "with_teacher_temperature",
}  # fmt: skip
DIVERGENCES = [name for name in kdloss.divergences.__all__ if name not in HELPERS]
DISTANCES = [name for name in kdloss.distances.__all__ if name not in HELPERS]
DISTANCES += [f"examples.{name}" for name in DISTANCES if hasattr(kdloss.distances.examples, name)]
SIDE_BY_SIDE = {"attention_mse": "queries and keys", "fsp": "two layers", "minilm": "queries, keys and values"}
SIDE_BY_SIDE["minilm_v2"] = SIDE_BY_SIDE["minilm"]
OF_TEXT = {"MGD": {"size": (1, -1)}}  # options that only the kind of data tells

Kind = TypeVar("Kind")


def read(defaults: Kind, arguments: Sequence[str] | None, words: str | None) -> Kind:
    """The settings on a command line (None: this process's own); `words` stand above its help."""
    settings = {"default": defaults, "description": words, "config": (tyro.conf.DisallowNone,)}
    return tyro.cli(type(defaults), args=arguments, **settings)


def some(kind: type[Kind], settings: Any, **changes: Any) -> Kind:
    """The settings of this kind among those of a script that has others, some of them changed."""
    ours = {field.name for field in fields(kind)}
    return kind(**{name: x for name, x in vars(settings).items() if name in ours} | changes)


def distance(name: str) -> Callable[..., Any]:
    """The distance of features with this name."""
    if name in SIDE_BY_SIDE:
        raise ValueError(
            f"{name} compares {SIDE_BY_SIDE[name]} side by side, and --layers gives single hidden states: write "
            f"kdloss.Features(..., distance=kdloss.distances.{name}) in a loop of your own, as its docstring shows"
        )
    within = kdloss.distances.examples if name.startswith("examples.") else kdloss.distances
    found = getattr(within, name.removeprefix("examples."))
    return partial(found, **OF_TEXT[name]) if name in OF_TEXT else found


def blocks_or_names(value: str) -> str | list[int] | list[str]:
    """A strategy ("auto"), indices ("0,3,-1"), or module names ("transformer.h.1,...")."""
    parts = value.split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        return parts if len(parts) > 1 or "." in value else value


def pairs(value: str) -> str | list[tuple[Any, Any]]:
    """A pairing ("uniform"), or pairs student:teacher ("0:1,1:3")."""
    if ":" not in value:
        return value
    halves = [part.split(":") for part in value.split(",")]
    if any(len(half) != 2 for half in halves):
        raise ValueError(f"pairs look like 0:1,1:3, got {value!r}")
    return [(int(s), int(t)) if (s + t).isdecimal() else (s, t) for s, t in halves]


def positive(value: str) -> int:
    """A number of things."""
    if int(value) < 1:
        raise ValueError(f"must be at least 1, got {value}")
    return int(value)


def by(
    function: Callable[[str], Any], metavar: str, shown: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """A setting that this function reads from one word, and `shown` writes."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: function(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [shown(value)],
    )


def joined(value: Any) -> str:
    """As `blocks_or_names` reads it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


COUNT = by(positive, "INT")
BLOCKS = by(blocks_or_names, "BLOCKS", joined)
WHICH_STUDENT = tyro.conf.create_mutex_group(required=False, title="a student that is not new")
HOW_LONG = tyro.conf.create_mutex_group(required=False, title="how long")


@dataclass(kw_only=True)
class Text:
    """Which text."""

    data: Annotated[
        str | None, Doc(".jsonl, .json, .csv or .txt file, or a dataset's name; else Wikipedia summaries")
    ] = None
    data_config: Annotated[str | None, Doc("the dataset's configuration")] = None
    split: Annotated[str, Doc("the dataset's split")] = "train"
    text_column: Annotated[str | None, Doc("where the text is; else found by usual names, or the longest")] = None
    samples: Annotated[int | None, COUNT, Doc("use so many texts, not all")] = None
    heldout_samples: Annotated[int, COUNT, Doc("the last ones, for evaluation")] = 200
    student_samples: Annotated[
        int | None, COUNT, Doc("texts that students see; else all, or 320 of those that the teacher is trained on here")
    ] = None
    max_length: Annotated[int, COUNT, Doc("tokens in a block")] = 64


@dataclass(kw_only=True)
class Teacher:
    """A teacher to load, or to train first."""

    teacher: Annotated[str | None, Doc("folder, .gguf file or hub name; else one is trained on all the text")] = None
    teachers: Annotated[Path, Doc("where trained ones are kept")] = Path("runs/teachers")
    teacher_layers: Annotated[int, COUNT, Doc("blocks of a trained one")] = 4
    teacher_width: Annotated[int, COUNT, Doc("its width")] = 128
    teacher_heads: Annotated[int, COUNT, Doc("its attention heads")] = 4
    teacher_epochs: Annotated[int, COUNT, Doc("how often it sees its text")] = 1
    teacher_samples: Annotated[int | None, COUNT, Doc("texts that it sees; else all but held-out ones")] = None
    teacher_lr: Annotated[float, Doc("its learning rate")] = 1.5e-3
    vocabulary: Annotated[int, COUNT, Doc("tokens of its tokenizer")] = 2048


@dataclass(kw_only=True)
class Student:
    """A student to load, to cut from the teacher, or to make."""

    student: Annotated[str | None, WHICH_STUDENT, Doc("folder, .gguf file or hub name; else a new GPT-2")] = None
    keep_blocks: Annotated[
        str | list[int] | list[str] | None,
        BLOCKS,
        WHICH_STUDENT,
        Doc("make it of the teacher's blocks: auto, all, key, late, last, or 0,2,5"),
    ] = None
    student_layers: Annotated[int, COUNT, Doc("blocks of a new one")] = 2
    student_width: Annotated[int, COUNT, Doc("its width")] = 96
    student_heads: Annotated[int, COUNT, Doc("its attention heads")] = 3
    student_blocks: Annotated[int | None, COUNT, Doc("blocks of text it sees, drawn by its seed; else all")] = None
    dropout: Annotated[float, Doc("its dropout")] = 0.0
    freeze_embeddings: Annotated[bool, Doc("don't train token embeddings")] = False


@dataclass(kw_only=True)
class Training:
    """How long, how fast, where."""

    epochs: Annotated[int, COUNT, HOW_LONG, Doc("passes over the student's text")] = 6
    steps: Annotated[int | None, COUNT, HOW_LONG, Doc("batches, instead of epochs")] = None
    batch_size: Annotated[int, COUNT, Doc("blocks in a batch")] = 8
    lr: Annotated[float, Doc("learning rate")] = 1e-3
    seed: Annotated[int, Doc("of the student's weights and the batches")] = 0
    device: Annotated[str, Doc("where it is trained")] = "cuda" if torch.cuda.is_available() else "cpu"
    save_every: Annotated[float, Doc("seconds between checkpoints")] = 60.0


@dataclass(kw_only=True)
class Distillation:
    """What the student learns from."""

    method: Annotated[Literal["vanilla", "feature", "both", "none"], Doc("what to learn from")] = "vanilla"
    temperature: Annotated[float, Doc("of both models' predictions")] = 1.0
    divergence: Annotated[Literal[tuple(DIVERGENCES)], Doc("between predictions")] = "forward_kl"
    alpha: Annotated[float | None, Doc("share of cross-entropy; else 0.1 for vanilla, 0.3 for feature and both")] = None
    logit_weight: Annotated[float, Doc("of the output term in both")] = 1.0
    layers: Annotated[
        str | list[int] | list[str] | None,
        BLOCKS,
        Doc("student layers: auto, all, key, late, last, indices or module names; else last"),
    ] = None
    pairing: Annotated[
        str | list[tuple[Any, Any]],
        by(pairs, "PAIRING"),
        Doc("with which teacher layers: uniform, same, first, last, kept, ..., or 0:1,1:3"),
    ] = "uniform"
    distance: Annotated[Literal[tuple(DISTANCES)], Doc("between features")] = "layer_norm_mse"


@dataclass(kw_only=True)
class Evaluation:
    """What is measured, and where the results go."""

    points: Annotated[int, COUNT, Doc("evaluations along a learning curve")] = 6
    continuations: Annotated[int, COUNT, Doc("texts continued for ROUGE")] = 64
    output: Annotated[Path, Doc("folder of results")] = Path("runs")
