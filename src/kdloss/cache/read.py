"""A teacher read from disk, by the ids of a batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from torch import Tensor

from kdloss.cache import _files, _manifest, _shard
from kdloss.cache._dataset import Id
from kdloss.cache.tokenizer import tokenizer_hash
from kdloss.targets import TopKLogits
from kdloss.targets.top_k import Tail


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
    `[B, k]`. Only what a batch needs is read; a shard's checksum is tested when it is first needed. `folder` and
    `manifest` are what `open` found on disk, `tail` and `device` what it was told.

    Raises: ValueError for an id that is not there, a length that doesn't fit, a shard that was cut or
    altered, naming it; TypeError for ids that are no list or 1-D tensor.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], tail: Tail, device: torch.device) -> None:
        self.folder, self.manifest, self.tail, self.device = folder, manifest, tail, device
        self._where: dict[Id, tuple[str, int]] = {}
        self._shards: dict[str, tuple[Any, list[int]]] = {}
        for name, sums in manifest["shards"].items():
            file = _shard.index_file(folder, name)
            _check(file, sums["index"])
            ids = json.loads(file.read_text(encoding="utf-8"))["ids"]
            self._where |= {id: (name, row) for row, id in enumerate(ids)}

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._where)

    def __contains__(self, id: object) -> bool:
        """Whether there is an example of this id."""
        return id in self._where

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
        whole = self.manifest.get("positions") == "examples"
        if whole and (length is not None or attention_mask is not None):
            raise TypeError(
                f"{self.folder} holds one row of classes for each example, of a classifier, and not one for each "
                "token; leave out length and attention_mask"
            )
        rows = [self._read(id) for id in ids]
        lengths = torch.tensor([len(log_rest) for *_, log_rest in rows])
        if attention_mask is not None:
            there = attention_mask.bool().cpu()
        else:
            there = torch.arange(int(lengths.max()) if length is None else length) < lengths.unsqueeze(-1)
        self._check_lengths(ids, lengths.tolist(), there.sum(-1).tolist())
        parts = [torch.cat(part) for part in zip(*rows, strict=True)]
        size, k = there.shape, self.manifest["k"]
        empty = torch.full((*size, k), -1), torch.full((*size, k), -torch.inf), torch.zeros(size)
        indices, log_probs, log_rest = (self._laid(x, y, there) for x, y in zip(empty, parts, strict=True))
        temperature, vocabulary = self.manifest["temperature"], self.manifest["vocabulary"]
        names = tuple(self.manifest["classes"]) if "classes" in self.manifest else None
        if whole:
            indices, log_probs, log_rest = indices.squeeze(1), log_probs.squeeze(1), log_rest.squeeze(1)
        return TopKLogits(indices, log_probs, self.tail, temperature, log_rest, vocabulary, names)

    def verify(self) -> None:
        """Test every shard's checksum now, not when it is first needed."""
        for name, sums in self.manifest["shards"].items():
            _check(_shard.data_file(self.folder, name), sums["sha256"])

    def _check_lengths(self, ids: Sequence[Id], stored: list[int], asked: list[int]) -> None:
        if len(asked) != len(ids):
            raise ValueError(f"{len(ids)} ids and an attention_mask of {len(asked)} rows; give one row per id")
        for id, ours, theirs in zip(ids, stored, asked, strict=True):
            if ours != theirs:
                raise ValueError(
                    f"example {id!r} has {ours} positions in {self._where[id][0]}, the batch {theirs}; "
                    "give the tokens, cut alike, that kdloss.cache.write was given"
                )

    def _laid(self, empty: Tensor, values: Tensor, there: Tensor) -> Tensor:
        empty[there] = values.to(empty.dtype)
        return empty.to(self.device)

    def _read(self, id: Id) -> tuple[Tensor, Tensor, Tensor]:
        if id not in self._where:
            some = next(iter(self._where))
            raise ValueError(
                f"{self.folder} has no example {id!r} among its {len(self)}, whose ids look like {some!r}; "
                "write it into a cache of its own, or leave it out"
            )
        name, row = self._where[id]
        file, offsets = self._shard(name)
        at = slice(offsets[row], offsets[row + 1])
        indices, log_probs, log_rest = (
            torch.from_numpy(file.get_slice(part)[at]) for part in ("indices", "log_probs", "log_rest")
        )
        return indices, log_probs, log_rest

    def _shard(self, name: str) -> tuple[Any, list[int]]:
        """A shard, mapped into memory; what a batch needs is read from there."""
        if name not in self._shards:
            path = _shard.data_file(self.folder, name)
            _check(path, self.manifest["shards"][name]["sha256"])
            file: Any = safe_open(path, framework="numpy")  # copies a slice; torch's would keep the whole file mapped
            self._shards[name] = file, file.get_tensor("offsets").tolist()
        return self._shards[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, so that workers of a DataLoader can be given it."""
        return self.__dict__ | {"_shards": {}}


def _check(file: Path, expected: str) -> None:
    if not file.exists():
        raise ValueError(f"{file} is gone; the same call of kdloss.cache.write writes it again")
    if _files.sha256(file) != expected:
        raise ValueError(
            f"{file} was cut or altered: its checksum is not the manifest's; the same call of "
            "kdloss.cache.write writes it again"
        )
