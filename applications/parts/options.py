"""The flags that these scripts share: every setting has one."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kdloss

HELPERS = {"between_examples", "between_tokens", "examples", "standardized", "tokens"}  # they make or help losses
DIVERGENCES = [name for name in kdloss.divergences.__all__ if name not in HELPERS]
DISTANCES = [name for name in kdloss.distances.__all__ if name not in HELPERS]
DISTANCES += [f"examples.{name}" for name in DISTANCES if hasattr(kdloss.distances.examples, name)]
SIDE_BY_SIDE = {"attention_mse": "queries and keys", "fsp": "two layers", "minilm": "queries, keys and values"}
SIDE_BY_SIDE["minilm_v2"] = SIDE_BY_SIDE["minilm"]
OF_TEXT = {"MGD": {"size": (1, -1)}}  # options that only the kind of data tells


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
        raise argparse.ArgumentTypeError(f"pairs look like 0:1,1:3, got {value!r}")
    return [(int(s), int(t)) if (s + t).isdecimal() else (s, t) for s, t in halves]


def positive(value: str) -> int:
    """A number of things."""
    if int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return int(value)


def parser(description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that shows the script's own words as they stand."""
    shown = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=shown, **settings)


def text_flags(made: argparse.ArgumentParser) -> None:
    """Which text."""
    add = made.add_argument_group("text").add_argument
    add(
        "--data",
        help=".jsonl, .json, .csv or .txt file, or a dataset's name (default: Wikipedia summaries)",
    )
    add("--data-config", help="the dataset's configuration")
    add("--split", default="train", help="the dataset's split (%(default)s)")
    add("--text-column", help="where the text is (default: found by usual names, else the longest)")
    add("--samples", type=positive, help="use so many texts (default: all)")
    add("--heldout-samples", type=positive, default=200, help="the last ones, for evaluation (%(default)s)")
    add(
        "--student-samples",
        type=positive,
        help="texts that students see (default: all; 320 of the text that the teacher is trained on here)",
    )
    add("--max-length", type=positive, default=64, help="tokens in a block (%(default)s)")


def teacher_flags(made: argparse.ArgumentParser) -> None:
    """A teacher to load, or to train first."""
    add = made.add_argument_group("teacher").add_argument
    add("--teacher", help="folder, .gguf file or hub name (default: train one on all the text)")
    kept = Path("runs/teachers")
    add("--teachers", type=Path, default=kept, help="where trained ones are kept (%(default)s)")
    add("--teacher-layers", type=positive, default=4, help="blocks of a trained one (%(default)s)")
    add("--teacher-width", type=positive, default=128, help="its width (%(default)s)")
    add("--teacher-heads", type=positive, default=4, help="its attention heads (%(default)s)")
    add("--teacher-epochs", type=positive, default=1, help="how often it sees its text (%(default)s)")
    add("--teacher-samples", type=positive, help="texts that it sees (default: all but held-out ones)")
    add("--teacher-lr", type=float, default=1.5e-3, help="its learning rate (%(default)s)")
    add("--vocabulary", type=positive, default=2048, help="tokens of its tokenizer (%(default)s)")


def student_flags(made: argparse.ArgumentParser) -> None:
    """A student to load, to cut from the teacher, or to make."""
    group = made.add_argument_group("student")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--student", help="folder, .gguf file or hub name (default: a new GPT-2)")
    one.add_argument(
        "--keep-blocks",
        type=blocks_or_names,
        metavar="BLOCKS",
        help="make it of the teacher's blocks: auto, all, key, late, last, or 0,2,5",
    )
    add = group.add_argument
    add("--student-layers", type=positive, default=2, help="blocks of a new one (%(default)s)")
    add("--student-width", type=positive, default=96, help="its width (%(default)s)")
    add("--student-heads", type=positive, default=3, help="its attention heads (%(default)s)")
    add("--student-blocks", type=positive, help="blocks of text it sees, drawn by its seed (default: all)")
    add("--dropout", type=float, default=0.0, help="its dropout (%(default)s)")
    add("--freeze-embeddings", action="store_true", help="don't train token embeddings")


def training_flags(made: argparse.ArgumentParser) -> None:
    """How long, how fast, where."""
    group = made.add_argument_group("training")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--epochs", type=positive, default=6, help="passes over the student's text (%(default)s)")
    one.add_argument("--steps", type=positive, help="batches, instead of epochs")
    add = group.add_argument
    add("--batch-size", type=positive, default=8, help="blocks in a batch (%(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="of the student's weights and the batches (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--save-every", type=float, default=60.0, help="seconds between checkpoints (%(default)s)")


def distillation_flags(made: argparse.ArgumentParser) -> None:
    """What the student learns from."""
    add = made.add_argument_group("distillation").add_argument
    methods = ["vanilla", "feature", "both", "none"]
    add("--method", choices=methods, default="vanilla", help="what to learn from (%(default)s)")
    add("--temperature", type=float, default=1.0, help="of both models' predictions (%(default)s)")
    add("--divergence", choices=DIVERGENCES, default="forward_kl", help="between predictions (%(default)s)")
    add("--alpha", type=float, help="share of cross-entropy (vanilla: 0.1, feature and both: 0.3)")
    add("--logit-weight", type=float, default=1.0, help="of the output term in both (%(default)s)")
    add(
        "--layers",
        type=blocks_or_names,
        help="student layers: auto, all, key, late, last, indices or module names (last)",
    )
    add(
        "--pairing",
        type=pairs,
        default="uniform",
        help="with which teacher layers: uniform, same, first, last, kept, ..., or 0:1,1:3 (%(default)s)",
    )
    add(
        "--distance",
        choices=DISTANCES,
        default="layer_norm_mse",
        help="between features (%(default)s)",
    )


def evaluation_flags(made: argparse.ArgumentParser, output: str) -> None:
    """What is measured, and where the results go."""
    add = made.add_argument_group("evaluation and results").add_argument
    add("--points", type=positive, default=6, help="evaluations along a learning curve (%(default)s)")
    add("--continuations", type=positive, default=64, help="texts continued for ROUGE (%(default)s)")
    add("--output", type=Path, default=Path(output), help="folder of results (%(default)s)")
