"""A teacher read from disk, by the ids of a batch."""

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
from kdloss.cache._whole import refuse_other, whole
from kdloss.cache.tokenizer import tokenizer_hash
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import Tail, right_rows


def open(folder: str | Path, *, tokenizer: Any, tail: Tail = "bucket", device: torch.device | str = "cpu") -> "Cache":
    """A cache that `kdloss.cache.write` made, ready to give batches; only its ids are read now.

    `tokenizer` is the one that makes the training batches (None where no tokens were read); `tail` says how the
    classes left out are treated (see `kdloss.TopKLogits`); batches are put on `device`.

    Raises: ValueError for a folder without a cache, an incomplete one, an index that was cut or altered,
    another tokenizer.
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
    """Stored classes by example id, whatever the order or the batch; made by `kdloss.cache.open`.

    `cache[ids]` are `TopKLogits` `[B, T, k]`, T being the longest example's length, with empty slots
    behind the shorter ones, to stand in a criterion where the teacher's logits would: position t holds
    what the teacher said at t, which a causal criterion shifts with the student's. Of a classifier they are
    `[B, k]`. Numbers are in the types they have on the disk, where a DataLoader pins them and `batch.to(device)` moves
    them, and become int64 and float32 in the loss. Files are mapped into memory and only what a batch needs is read; a
    shard's checksum is tested when it is first needed on this machine, and again after the file changed. `folder` and
    `manifest` are what `open` found on disk, `tail` and `device` what it was told.

    Raises: ValueError for an id that is not there, a length that doesn't fit, a shard that was cut or
    altered, naming it; TypeError for ids that are no list or 1-D tensor.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tail: Tail, device: torch.device) -> None:
        self.folder, self.manifest, self.tail, self.device = folder, manifest, tail, device
        ids: list[Id] = []
        for name, sums in manifest["shards"].items():
            ids += _ids(_shard.index_file(folder, name), sums["index"])
        self._set(ids)

    def _set(self, ids: list[Id]) -> None:
        self._numbers = {id: number for number, id in enumerate(ids)}  # whole numbers take the least memory
        self._names = [*self.manifest["shards"]]
        self._classes = tuple(self.manifest["classes"]) if "classes" in self.manifest else None
        self._open: dict[int, tuple[list[int], list[Any]]] = {}

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._numbers)

    def __contains__(self, id: object) -> bool:
        """Whether there is an example of this id."""
        return id in self._numbers

    def __getitem__(self, ids: Sequence[Id] | Int[Tensor, " batch"]) -> TopKLogits:
        """The classes of the examples with these `ids`, padded at the right to the longest one."""
        return self.batch(ids)

    def batch(
        self,
        ids: Sequence[Id] | Int[Tensor, " batch"],
        length: int | None = None,
        *,
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
    ) -> TopKLogits:
        """As `cache[ids]`, but padded at the right to `length`, or laid where an `attention_mask` isn't 0."""
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
        indices, log_probs, log_rest = _shard.laid(rows, places, longest, vocabulary)
        if one_each:
            indices, log_probs, log_rest = indices.squeeze(1), log_probs.squeeze(1), log_rest.squeeze(1)
        found = right_rows(indices, log_probs, self.tail, temperature, log_rest, vocabulary, self._classes)
        return found.to(self.device)

    def verify(self) -> None:
        """Test every shard's checksum now, whatever was tested before."""
        for name, sums in self.manifest["shards"].items():
            whole(_shard.data_file(self.folder, name), sums["sha256"], again=True)

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
        """An example's indices, log_probs and log_rest, as they lie in the file."""
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
            whole(file, self.manifest["shards"][name]["sha256"])
            self._open[shard] = _shard.mapped(file)
        offsets, parts = self._open[shard]
        at = slice(offsets[row], offsets[row + 1])
        return [part[at] for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, so that workers of a DataLoader can be given it."""
        told = {name: getattr(self, name) for name in ("folder", "manifest", "tail", "device")}
        return told | {"ids": [*self._numbers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Files are opened where they are needed."""
        ids = state.pop("ids")
        vars(self).update(state)
        self._set(ids)


def _ids(file: Path, expected: str) -> list[Id]:
    """The ids in an index that is as it was written."""
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{file} is gone; the same call of kdloss.cache.write writes it again") from error
    refuse_other(file, hashlib.sha256(content).hexdigest(), expected)
    ids: list[Id] = json.loads(content)["ids"]
    return ids
