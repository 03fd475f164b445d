"""The settings that the scripts share, as dataclasses; tyro makes every setting a flag."""

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

# Names that are not a loss, or need arguments.
HELPERS = {
    "between_examples", "between_tokens", "examples", "sinkhorn", "standardized", "tokens", "with_teacher_temperature",
}  # fmt: skip
DIVERGENCES = [name for name in kdloss.divergences.__all__ if name not in HELPERS]
DISTANCES = [name for name in kdloss.distances.__all__ if name not in HELPERS]
DISTANCES += [f"examples.{name}" for name in DISTANCES if hasattr(kdloss.distances.examples, name)]
SIDE_BY_SIDE = {"attention_mse": "queries and keys", "fsp": "two layers", "minilm": "queries, keys and values"}
SIDE_BY_SIDE["minilm_v2"] = SIDE_BY_SIDE["minilm"]
OF_TEXT = {"MGD": {"size": (1, -1)}}  # options that depend on the kind of data

Kind = TypeVar("Kind")


def read(defaults: Kind, arguments: Sequence[str] | None, words: str | None) -> Kind:
    """Parse the settings from a command line (None: sys.argv); `words` is the text above the help."""
    settings = {"default": defaults, "description": words, "config": (tyro.conf.DisallowNone,)}
    return tyro.cli(type(defaults), args=arguments, **settings)


def some(kind: type[Kind], settings: Any, **changes: Any) -> Kind:
    """The settings of type `kind`, taken from a script's larger settings, with `changes`."""
    ours = {field.name for field in fields(kind)}
    return kind(**{name: x for name, x in vars(settings).items() if name in ours} | changes)


def distance(name: str) -> Callable[..., Any]:
    """The feature distance with this name."""
    if name in SIDE_BY_SIDE:
        raise ValueError(
            f"{name} compares {SIDE_BY_SIDE[name]} side by side, and --layers gives single hidden states: use "
            f"kdloss.Features(..., distance=kdloss.distances.{name}) in your own loop, as its docstring shows"
        )
    within = kdloss.distances.examples if name.startswith("examples.") else kdloss.distances
    found = getattr(within, name.removeprefix("examples."))
    return partial(found, **OF_TEXT[name]) if name in OF_TEXT else found


def blocks_or_names(value: str) -> str | list[int] | list[str]:
    """Parse a strategy ("auto"), indices ("0,3,-1"), or module names ("transformer.h.1,...")."""
    parts = value.split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        return parts if len(parts) > 1 or "." in value else value


def pairs(value: str) -> str | list[tuple[Any, Any]]:
    """Parse a pairing ("uniform"), or pairs student:teacher ("0:1,1:3")."""
    if ":" not in value:
        return value
    halves = [part.split(":") for part in value.split(",")]
    if any(len(half) != 2 for half in halves):
        raise ValueError(f"pairs look like 0:1,1:3, got {value!r}")
    return [(int(s), int(t)) if (s + t).isdecimal() else (s, t) for s, t in halves]


def positive(value: str) -> int:
    """Parse an integer of at least 1."""
    if int(value) < 1:
        raise ValueError(f"must be at least 1, got {value}")
    return int(value)


def by(
    function: Callable[[str], Any], metavar: str, shown: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """A setting that `function` parses from one word, and `shown` formats."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: function(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [shown(value)],
    )


def joined(value: Any) -> str:
    """Format a value in the way that `blocks_or_names` parses."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


COUNT = by(positive, "INT")
BLOCKS = by(blocks_or_names, "BLOCKS", joined)
WHICH_STUDENT = tyro.conf.create_mutex_group(required=False, title="a student that is not new")
HOW_LONG = tyro.conf.create_mutex_group(required=False, title="how long")


@dataclass(kw_only=True)
class Text:
    """The text."""

    data: Annotated[
        str | None, Doc(".jsonl, .json, .csv or .txt file, or a dataset's name; otherwise Wikipedia summaries")
    ] = None
    data_config: Annotated[str | None, Doc("configuration of the dataset")] = None
    split: Annotated[str, Doc("split of the dataset")] = "train"
    text_column: Annotated[str | None, Doc("column of the text; otherwise found by common names or by length")] = None
    samples: Annotated[int | None, COUNT, Doc("number of texts to use; otherwise all")] = None
    heldout_samples: Annotated[int, COUNT, Doc("texts held out for evaluation, from the end")] = 200
    student_samples: Annotated[
        int | None, COUNT, Doc("texts of students; otherwise all, or 320 if the teacher is trained here")
    ] = None
    max_length: Annotated[int, COUNT, Doc("tokens per block")] = 64


@dataclass(kw_only=True)
class Teacher:
    """A teacher to load, or to train first."""

    teacher: Annotated[str | None, Doc("folder, .gguf file or hub name; otherwise one is trained on all texts")] = None
    teachers: Annotated[Path, Doc("folder of trained teachers")] = Path("runs/teachers")
    teacher_layers: Annotated[int, COUNT, Doc("blocks of a teacher that is trained here")] = 4
    teacher_width: Annotated[int, COUNT, Doc("width of that teacher")] = 128
    teacher_heads: Annotated[int, COUNT, Doc("attention heads of that teacher")] = 4
    teacher_epochs: Annotated[int, COUNT, Doc("epochs of that teacher")] = 1
    teacher_samples: Annotated[int | None, COUNT, Doc("texts of that teacher; otherwise all not held out")] = None
    teacher_lr: Annotated[float, Doc("learning rate of that teacher")] = 1.5e-3
    vocabulary: Annotated[int, COUNT, Doc("vocabulary size of its tokenizer")] = 2048


@dataclass(kw_only=True)
class Student:
    """A student to load, to cut from the teacher, or to make."""

    student: Annotated[str | None, WHICH_STUDENT, Doc("folder, .gguf file or hub name; otherwise a new GPT-2")] = None
    keep_blocks: Annotated[
        str | list[int] | list[str] | None,
        BLOCKS,
        WHICH_STUDENT,
        Doc("make the student of these blocks of the teacher: auto, all, key, late, last, or 0,2,5"),
    ] = None
    student_layers: Annotated[int, COUNT, Doc("blocks of a new student")] = 2
    student_width: Annotated[int, COUNT, Doc("width of a new student")] = 96
    student_heads: Annotated[int, COUNT, Doc("attention heads of a new student")] = 3
    student_blocks: Annotated[int | None, COUNT, Doc("blocks of text, drawn by the seed; otherwise all")] = None
    dropout: Annotated[float, Doc("dropout of a new student")] = 0.0
    freeze_embeddings: Annotated[bool, Doc("do not train token embeddings")] = False


@dataclass(kw_only=True)
class Training:
    """How long, how fast, where."""

    epochs: Annotated[int, COUNT, HOW_LONG, Doc("passes over the student's text")] = 6
    steps: Annotated[int | None, COUNT, HOW_LONG, Doc("number of steps, in place of epochs")] = None
    batch_size: Annotated[int, COUNT, Doc("blocks per batch")] = 8
    lr: Annotated[float, Doc("learning rate")] = 1e-3
    seed: Annotated[int, Doc("seed of the student's weights and of the batches")] = 0
    device: Annotated[str, Doc("device to train on")] = "cuda" if torch.cuda.is_available() else "cpu"
    save_every: Annotated[float, Doc("seconds between checkpoints")] = 60.0


@dataclass(kw_only=True)
class Distillation:
    """The loss."""

    method: Annotated[
        Literal["vanilla", "feature", "both", "none"],
        Doc("learn from logits (vanilla), features, both, or labels alone"),
    ] = "vanilla"
    temperature: Annotated[float, Doc("divides both models' logits")] = 1.0
    divergence: Annotated[Literal[tuple(DIVERGENCES)], Doc("divergence between predictions")] = "forward_kl"
    alpha: Annotated[float | None, Doc("weight of cross-entropy; otherwise 0.1, or 0.3 with features")] = None
    logit_weight: Annotated[float, Doc("weight of the logits in the method both")] = 1.0
    layers: Annotated[
        str | list[int] | list[str] | None,
        BLOCKS,
        Doc("student layers: auto, all, key, late, last, indices or module names; otherwise last"),
    ] = None
    pairing: Annotated[
        str | list[tuple[Any, Any]],
        by(pairs, "PAIRING"),
        Doc("pairing with teacher layers: uniform, same, first, last, kept, ..., or 0:1,1:3"),
    ] = "uniform"
    distance: Annotated[Literal[tuple(DISTANCES)], Doc("distance between features")] = "layer_norm_mse"


@dataclass(kw_only=True)
class Evaluation:
    """The evaluation, and the folder of results."""

    points: Annotated[int, COUNT, Doc("points of a learning curve")] = 6
    continuations: Annotated[int, COUNT, Doc("held-out texts to continue for ROUGE")] = 64
    output: Annotated[Path, Doc("folder of results")] = Path("runs")
