"""Run a teacher once over a dataset and store its most probable classes on disk."""

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
    r"""Run a teacher once over a dataset and store its k most probable classes at every position.

    It stores the k largest $\log p_v$ of $p = \mathrm{softmax}(t/T)$ in float16, their indices in the narrowest
    integer type that holds the vocabulary, and the log-probability of all other classes together. T is `temperature`:
    use the one that you will train with. `kdloss.cache.open` reads the files in `folder` by example id.

    - `dataset`: a `datasets.Dataset` with unique ids (strings or integers) in the column `id_column`, `input_ids`
      (lists) and optionally `attention_mask`. Masked tokens are padding at the beginning or the end of an example; the
      teacher does not read them and they are not stored. All other columns that the teacher's forward names
      are passed to it too. Those with integers for each token (`token_type_ids`) are cut like the tokens; others
      (`pixel_values`) are passed as they are.
    - Packed rows: if `position_ids` restart, or if `seq_idx`, `seq_lengths` or a numbered `attention_mask` mark several
      documents in a row, the teacher reads each document by itself.
    - `teacher`: it runs in eval mode on its own device, also if it is offloaded or quantised; its modes are restored
      afterwards. For a classifier with logits `[B, C]` one row is stored for each example. An image model needs no
      `input_ids`; for it write `tokenizer=None`. `teacher_name` is its name in the manifest, by default its
      `name_or_path` or its class.

    You can interrupt it at any time: repeat the same call and it continues. Files are written atomically, and shards
    that are finished, by their checksum, are skipped. Batches never cross shards and depend only on the dataset's
    order, `batch_size` and `shard_size`. On one kind of machine and with one number of threads, every run therefore
    writes the same bytes, interrupted or not, with one process or several. Under torch.distributed or torchrun each
    process writes every world-size-th shard.

    Raises: ValueError or TypeError for a folder that was begun with other settings (with their names) or from other
    examples, for duplicate ids, k larger than the vocabulary, a mask with holes, NaN, positions that are not those of
    packed documents, and logits of other shapes; OSError for a full disk.

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
    columns = _dataset.extra_columns(dataset, id_column, names, of_tokens)
    first = _dataset.read(dataset, slice(0, 1), id_column, columns, of_tokens)
    document = _teacher.pieces_of(first, 0)[:1]
    logits = _teacher.pass_of(teacher, document, first)
    vocabulary = _teacher.split_logits(logits, document)[0].shape[-1]
    if k > vocabulary:
        raise ValueError(f"k={k}, but the teacher has {vocabulary} classes; k must be between 1 and {vocabulary}")
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
    _files.remove_partials(folder, rank, world)
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
    """The rank of this process and the number of processes, from torch.distributed or else from torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def progress(total: int, rank: int) -> Iterator[Any]:
    """Yield a function to call with the number of examples done; it moves a progress bar if tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=total, desc="teacher", unit="example", disable=rank > 0, dynamic_ncols=True) as bar:
        yield bar.update
