"""A shard: one file with the classes of some examples, concatenated without padding, and an index of their ids."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as serialized
from torch import Tensor

from kdloss.cache import _files
from kdloss.cache._dataset import Examples, Id
from kdloss.targets import TopKLogits

_TENSORS = ("offsets", "indices", "log_probs", "log_rest")
_TYPES = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1", "F16": "<f2"}


class Kept(NamedTuple):
    """What is stored of a batch: its positions, concatenated, in stored types, and the length of each example."""

    lengths: list[int]
    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, documents: Sequence[TopKLogits], lengths: list[int], ids: Sequence[Id]) -> "Kept":
        """Concatenate the classes of documents on the CPU. NaN raises, with the id of the example."""
        vocabulary = documents[0].vocabulary
        assert vocabulary is not None
        indices = torch.cat([x.indices for x in documents]).to(index_dtype(vocabulary)).cpu()
        log_probs = torch.cat([x.log_probs for x in documents]).half().cpu()
        log_rest = torch.cat([x.log_rest for x in documents if x.log_rest is not None]).half().cpu()
        if (wrong := log_probs.isnan().any(-1)).any():
            position = int(wrong.nonzero()[0])
            id = ids[next(i for i, end in enumerate(accumulate(lengths)) if position < end)]
            raise ValueError(f"the teacher's logits of example {id!r} hold NaN; nothing of its shard is kept")
        return cls(lengths, indices, log_probs, log_rest)


def names(count: int) -> list[str]:
    """The names of `count` shards."""
    return [f"shard-{i:05d}" for i in range(count)]


def data_file(folder: Path, name: str) -> Path:
    """The file with a shard's numbers."""
    return folder / f"{name}.safetensors"


def index_file(folder: Path, name: str) -> Path:
    """The file with a shard's ids. It is written last, so a shard with an index is finished."""
    return folder / f"{name}.json"


def finished(folder: Path, name: str, examples: Examples) -> bool:
    """Whether the shard exists and is unchanged. Raises if it was written from other examples."""
    try:
        index = json.loads(index_file(folder, name).read_text(encoding="utf-8"))
        if _files.sha256(data_file(folder, name)) != index["sha256"]:
            return False
        of_these = index["examples_sha256"] == examples.digest()
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if not of_these:
        raise ValueError(
            f"{data_file(folder, name)} was written from other examples (or in another order) than the "
            "dataset has there now; write into another folder, or remove this one"
        )
    return bool(index["ids"] == examples.ids)


def save(folder: Path, name: str, examples: Examples, kept: Sequence[Kept], rank: int) -> None:
    """Write the numbers, then the index."""
    index_file(folder, name).unlink(missing_ok=True)
    with _files.replacing(data_file(folder, name), rank) as partial:
        partial.write_bytes(serialized(tensors(kept)))  # save_file writes to a file of its own, which a kill leaves
    index = {
        "sha256": _files.sha256(data_file(folder, name)),
        "examples_sha256": examples.digest(),
        "ids": examples.ids,
    }
    _files.save_json(index, index_file(folder, name), rank)


def tensors(kept: Sequence[Kept]) -> dict[str, Tensor]:
    """All positions, concatenated; example i is from offsets[i] to offsets[i + 1]."""
    return {
        "offsets": torch.tensor([0, *(n for batch in kept for n in batch.lengths)]).cumsum(0),
        "indices": torch.cat([batch.indices for batch in kept]),
        "log_probs": torch.cat([batch.log_probs for batch in kept]),
        "log_rest": torch.cat([batch.log_rest for batch in kept]),
    }


def index_dtype(vocabulary: int) -> torch.dtype:
    """The narrowest integer dtype for this many classes."""
    sizes = {2**8: torch.uint8, 2**16: torch.uint16, 2**31: torch.int32}
    return next(dtype for size, dtype in sizes.items() if vocabulary <= size)


def mapped(file: Path) -> tuple[list[int], list[Any]]:
    """A shard's offsets, and read-only views of its indices, log_probs and log_rest in the mapped file.

    Only pages that are used are read from the disk. A file is the length of its header, the header, and the numbers.
    """
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    # each numpy.memmap keeps a file open, and a process may be limited to a thousand open files
    content = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8).numpy()[start:]
    offsets, *arrays = (
        content[slice(*header[name]["data_offsets"])].view(_TYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
        for name in _TENSORS
    )
    return offsets.tolist(), arrays


def padded_batch(rows: Sequence[Sequence[Any]], places: Sequence[Any], length: int, vocabulary: int) -> list[Tensor]:
    """Copy the numbers of some examples into a batch of `length`, each at its places, with empty slots elsewhere."""
    ids = str(index_dtype(vocabulary + 1)).removeprefix("torch.")  # a dtype with room for the empty slot
    padded = sum(len(log_rest) for *_, log_rest in rows) < len(rows) * length
    found = []
    for arrays, dtype, empty in zip(zip(*rows, strict=True), (ids, "<f2", "<f2"), (-1, -np.inf, 0), strict=True):
        there = np.empty((len(rows), length, *arrays[0].shape[1:]), dtype)
        if padded:
            there.fill(np.array(empty).astype(dtype))
        for i, (row, place) in enumerate(zip(arrays, places, strict=True)):
            there[i, place] = row
        found.append(torch.from_numpy(there))
    return found
