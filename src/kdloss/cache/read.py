"""Read a teacher's classes from disk, by the ids of a batch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kdloss.cache import _manifest, _shard
from kdloss.cache._dataset import Id
from kdloss.cache._intact import check_checksum, check_intact
from kdloss.cache.tokenizer import tokenizer_hash
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import Tail, right_rows


def open(folder: str | Path, *, tokenizer: Any, tail: Tail = "bucket", device: torch.device | str = "cpu") -> "Cache":
    """Open the cache that `kdloss.cache.write` made in `folder`. This reads only the ids; batches are read later.

    `tokenizer` is the one that makes the training batches (None if the teacher reads no tokens). `tail` says how the
    classes that are not stored are treated (see `kdloss.TopKLogits`). Batches are moved to `device`.

    Raises: ValueError for a folder without a cache, an incomplete cache, an index that was cut or altered, and another
    tokenizer than the teacher's.
    """
    folder = Path(folder)
    manifest = _manifest.read(folder)
    if "shards" not in manifest:
        count, missing = _manifest.shard_count(manifest), _manifest.missing(folder, manifest)
        raise ValueError(
            f"{folder} is not complete: {len(missing)} of {count} shards are missing; the same call of "
            "kdloss.cache.write, with the same settings, goes on and writes them"
        )
    theirs = manifest["tokenizer"]
    ours = None if tokenizer is None and theirs is None else tokenizer_hash(tokenizer)
    if ours != theirs:
        raise ValueError(
            f"{folder} was written with another tokenizer (hash {str(theirs)[:12]}, this one {str(ours)[:12]}); "
            f"open it with that of its teacher {manifest['teacher']!r}. For a student with "
            "other tokens: VanillaKD(vocabulary=kdloss.TokenMap.of(student_tokenizer, teacher_tokenizer))"
        )
    return Cache(folder, manifest, tail, torch.device(device))


class Cache:
    """A teacher's stored classes, by example id, in any order and any batches. Made by `kdloss.cache.open`.

    `cache[ids]` returns `TopKLogits` `[B, T, k]`, where T is the length of the longest example and shorter ones are
    padded with empty slots at the right; `batch(ids, attention_mask=mask)` is for batches padded at the left. Pass it
    to a criterion in place of the teacher's logits. Position t holds the teacher's prediction at t; a causal criterion
    shifts it together with the student's. For a classifier it is `[B, k]`.

    Numbers keep their on-disk types while a DataLoader pins them and `batch.to(device)` moves them; the loss converts
    them to int64 and float32. Files are mapped into memory, and only what a batch needs is read. A shard's checksum is
    tested when the shard is first needed on this machine, and again if the file changes. `folder` and `manifest` are
    what `open` found on disk; `tail` and `device` are its arguments.

    Raises: ValueError for an unknown id, a length that doesn't fit, and a shard that was cut or altered, with its name;
    TypeError for ids that are not a list or a 1-D tensor.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tail: Tail, device: torch.device) -> None:
        self.folder, self.manifest, self.tail, self.device = folder, manifest, tail, device
        ids: list[Id] = []
        for name, sums in manifest["shards"].items():
            ids += _ids(_shard.index_file(folder, name), sums["index"])
        self._set(ids)

    def _set(self, ids: list[Id]) -> None:
        self._numbers = {id: number for number, id in enumerate(ids)}  # integers take the least memory
        self._names = [*self.manifest["shards"]]
        self._classes = tuple(self.manifest["classes"]) if "classes" in self.manifest else None
        self._open: dict[int, tuple[list[int], list[Any]]] = {}

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._numbers)

    def __contains__(self, id: object) -> bool:
        """Whether there is an example with this `id`."""
        return id in self._numbers

    def __getitem__(self, ids: Sequence[Id] | Int[Tensor, " batch"]) -> TopKLogits:
        """The classes of the examples with these `ids`, padded at the right to the longest example."""
        return self.batch(ids)

    def batch(
        self,
        ids: Sequence[Id] | Int[Tensor, " batch"],
        length: int | None = None,
        *,
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    ) -> TopKLogits:
        """As `cache[ids]`, but padded at the right to `length`, or placed where `attention_mask` isn't 0."""
        ids = ids.tolist() if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        if isinstance(ids, (str, int, Tensor)) or not len(ids):
            raise TypeError(f"ids must be a list or a 1-D tensor, as cache[[id]], got {ids!r}")
        one_each = self.manifest.get("positions") == "examples"
        if one_each and (length is not None or attention_mask is not None):
            raise TypeError(
                f"{self.folder} holds one row of classes for each example, of a classifier, and not one for each "
                "token; leave out length and attention_mask"
            )
        rows = [self._read(id) for id in ids]
        lengths = [len(log_rest) for *_, log_rest in rows]
        longest = max(lengths)
        places: Any = [slice(n) for n in lengths]
        if attention_mask is not None:
            places, longest = attention_mask.bool().cpu().numpy(), attention_mask.shape[-1]
            self._check_lengths(ids, lengths, places.sum(-1).tolist())
        elif length is not None:
            self._check_lengths(ids, lengths, [min(n, length) for n in lengths])
            longest = length
        vocabulary, temperature = self.manifest["vocabulary"], self.manifest["temperature"]
        indices, log_probs, log_rest = _shard.padded_batch(rows, places, longest, vocabulary)
        if one_each:
            indices, log_probs, log_rest = indices.squeeze(1), log_probs.squeeze(1), log_rest.squeeze(1)
        found = right_rows(indices, log_probs, self.tail, temperature, log_rest, vocabulary, self._classes)
        return found.to(self.device)

    def verify(self) -> None:
        """Test the checksums of all shards now, even those that were tested before."""
        for name, sums in self.manifest["shards"].items():
            check_intact(_shard.data_file(self.folder, name), sums["sha256"], again=True)

    def _check_lengths(self, ids: Sequence[Id], stored: list[int], asked: list[int]) -> None:
        if len(asked) != len(ids):
            raise ValueError(f"{len(ids)} ids and an attention_mask of {len(asked)} rows; give one row per id")
        for id, ours, theirs in zip(ids, stored, asked, strict=True):
            if ours != theirs:
                name = self._names[self._numbers[id] // self.manifest["shard_size"]]
                raise ValueError(
                    f"example {id!r} has {ours} positions in {name}, the batch {theirs}; "
                    "give the tokens, cut alike, that kdloss.cache.write was given"
                )

    def _read(self, id: Id) -> list[Any]:
        """An example's indices, log_probs and log_rest, as views of the file."""
        if id not in self._numbers:
            some = next(iter(self._numbers))
            raise ValueError(
                f"{self.folder} has no example {id!r} among its {len(self)}, whose ids look like {some!r}; "
                "write it into a cache of its own, or leave it out"
            )
        shard, row = divmod(self._numbers[id], self.manifest["shard_size"])
        if shard not in self._open:
            name = self._names[shard]
            file = _shard.data_file(self.folder, name)
            check_intact(file, self.manifest["shards"][name]["sha256"])
            self._open[shard] = _shard.mapped(file)
        offsets, arrays = self._open[shard]
        at = slice(offsets[row], offsets[row + 1])
        return [array[at] for array in arrays]

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, so that a DataLoader can pass the cache to its workers."""
        settings = {name: getattr(self, name) for name in ("folder", "manifest", "tail", "device")}
        return settings | {"ids": [*self._numbers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the settings and ids; files are opened when they are needed."""
        ids = state.pop("ids")
        vars(self).update(state)
        self._set(ids)


def _ids(file: Path, expected: str) -> list[Id]:
    """Read the ids from an index, after a check of its checksum."""
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is gone; the same call of kdloss.cache.write writes it again") from error
    check_checksum(file, hashlib.sha256(content).hexdigest(), expected)
    ids: list[Id] = json.loads(content)["ids"]
    return ids
