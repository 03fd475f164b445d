"""A teacher run once over a dataset, its most probable classes kept on disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from kdloss import _checks
from kdloss._classes import class_names
from kdloss._inputs import taken_by
from kdloss.cache import _dataset, _files, _manifest, _shard, _teacher
from kdloss.cache._weights import fingerprint
from kdloss.cache.tokenizer import tokenizer_hash


def write(
    folder: str | Path,
    teacher: nn.Module,
    dataset: Any,
    *,
    tokenizer: Any,
    k: int,
    temperature: float = 1.0,
    id_column: str = "id",
    teacher_name: str | None = None,
    batch_size: int = 8,
    shard_size: int = 1024,
) -> None:
    r"""Run a teacher once over a dataset and keep its k most probable classes at every position.

    Kept are the k largest $\log p_v$ of $p = \mathrm{softmax}(t/T)$ in float16, their indices in the
    narrowest integers that hold the vocabulary, and the log-probability of all the other classes
    together; T is the temperature you will train with. `kdloss.cache.open` reads them by id.

    `dataset` is a `datasets.Dataset` with a column of ids, `id_column` (strings or integers, none twice),
    `input_ids` (lists), and maybe `attention_mask`; what that masks is padding, at an example's
    beginning or end, and neither read by the teacher nor stored. Every other column that the teacher's
    forward names is given to it, too: those with whole numbers for each token (`token_type_ids`) cut like
    the tokens, others (`pixel_values`) as they are. Where `position_ids` start anew, or `seq_idx`, `seq_lengths` or
    an `attention_mask` that numbers them say that a row is packed, the teacher reads each document by itself.
    Of a classifier, whose logits are `[B, C]`, one row is kept for each example. A teacher of images
    needs no `input_ids`, and tokenizer=None. The teacher runs on the device it is
    on, offloaded or quantised as it may be, in eval mode; its modes are restored. The manifest
    calls it `teacher_name`, by default its `name_or_path` or its class.

    A file is there only when it is whole. Killed at any instant, the same call goes on: shards that
    are finished, by their checksum, are skipped. Batches never cross shards and follow from the
    dataset's order, `batch_size` and `shard_size` alone, so that on one kind of machine, with one
    number of threads, every way to the end gives the same bytes: interrupted or not, by one process
    or several. Under torch.distributed or torchrun each process writes every world-size-th shard.

    Raises: ValueError or TypeError for a folder begun with other settings, naming them, for other
    examples than were there before, for duplicate ids, k beyond the vocabulary, a mask with holes, NaN,
    positions that are no packing, logits of other shapes; OSError for a full disk.

    >>> import datasets, tempfile, torch
    >>> from tokenizers import Tokenizer, models
    >>> import kdloss.cache
    >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a"))
    >>> teacher = torch.nn.Sequential(torch.nn.Embedding(3, 3))
    >>> teacher.forward = lambda input_ids, attention_mask: teacher[0](input_ids)
    >>> data = datasets.Dataset.from_dict({"id": ["x", "y"], "input_ids": [[0, 1, 2], [2]]})
    >>> folder = tempfile.mkdtemp()
    >>> kdloss.cache.write(folder, teacher, data, tokenizer=tokenizer, k=2)
    >>> kdloss.cache.open(folder, tokenizer=tokenizer)[["y", "x"]].shape
    torch.Size([2, 3, 2])
    """
    folder, (rank, world) = Path(folder), place()
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher is a model, got {type(teacher).__name__}; of a function make a module that calls it")
    names, anything = taken_by(teacher)
    of_tokens = "input_ids" in names or (anything and not names)
    ids = _dataset.checked_ids(dataset, id_column, of_tokens)
    for name, value in {"k": k, "batch_size": batch_size, "shard_size": shard_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    temperature = _checks.temperature(temperature)
    tokens_of = tokenizer_hash(tokenizer) if of_tokens or tokenizer is not None else None
    columns = _dataset.beside(dataset, id_column, names, of_tokens)
    first = _dataset.read(dataset, slice(0, 1), id_column, columns, of_tokens)
    document = _teacher.pieces_of(first, 0)[:1]
    logits = _teacher.pass_of(teacher, document, first)
    vocabulary = _teacher.apart(logits, document)[0].shape[-1]
    if k > vocabulary:
        raise ValueError(f"k={k} of {vocabulary} classes; k lies between 1 and their number")
    settings = {
        "format": _manifest.FORMAT,
        "teacher": teacher_name or getattr(teacher, "name_or_path", "") or type(teacher).__name__,
        "teacher_weights": fingerprint(teacher),
        "tokenizer": tokens_of,
        "vocabulary": vocabulary,
        "k": k,
        "temperature": temperature,
        "dtype": "float16",
        "examples": len(ids),
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    if columns:
        settings["columns"] = columns
    named = class_names(teacher)
    if named is not None and len(named) == vocabulary:
        settings["classes"] = [*named]
    if logits.ndim == 2:
        settings["positions"] = "examples"
    _manifest.begin(folder, settings, rank)
    _files.sweep(folder, rank, world)
    mine = [*enumerate(_shard.names(_manifest.shard_count(settings)))][rank::world]
    with progress(sum(len(ids[i * shard_size :][:shard_size]) for i, _ in mine), rank) as bar:
        for i, name in mine:
            rows = slice(i * shard_size, (i + 1) * shard_size)
            examples = _dataset.read(dataset, rows, id_column, columns, of_tokens)
            if _shard.finished(folder, name, examples):
                bar(len(examples.ids))
                continue
            kept = []
            for batch in _teacher.top_k(teacher, examples, batch_size, k, temperature):
                kept.append(batch)
                bar(len(batch.lengths))
            _shard.save(folder, name, examples, kept, rank)
    _manifest.complete(folder, settings, rank)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def place() -> tuple[int, int]:
    """The rank of this process and the number of processes: torch.distributed's, else torchrun's."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def progress(total: int, rank: int) -> Iterator[Any]:
    """Called with the number of examples done; a bar where tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=total, desc="teacher", unit="example", disable=rank > 0, dynamic_ncols=True) as bar:
        yield bar.update
