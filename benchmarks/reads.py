"""How fast a cache is read, compared with numpy's memory map of the same data: `python benchmarks/reads.py`."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import nn

import kdloss.cache

EXAMPLES, BATCH, TOKENS, K, VOCABULARY = 512, 8, 256, 64, 4000  # uint16 ids, as up to 65 536 classes


class Teacher(nn.Module):
    """A teacher with the same logits for every text."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(TOKENS, VOCABULARY))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(input_ids), -1, -1)


def cache_reads(rounds: int = 7) -> tuple[float, float]:
    """Tokens per second of CPU time from a cache and from memory-mapped arrays; random batches, medians."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
    rows = datasets.Dataset.from_dict({"id": [*range(EXAMPLES)], "input_ids": [[0] * TOKENS] * EXAMPLES})
    order = random.Random(0)
    batches = [order.sample(range(EXAMPLES), BATCH) for _ in range(64)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kdloss.cache.write(folder / "cache", Teacher(), rows, tokenizer=tokenizer, k=K, shard_size=64)
        cache = kdloss.cache.open(folder / "cache", tokenizer=tokenizer)
        everything = cache[[*range(EXAMPLES)]]
        mapped = []
        for part in ("indices", "log_probs", "log_rest"):
            np.save(folder / f"{part}.npy", getattr(everything, part).numpy())
            mapped.append(np.load(folder / f"{part}.npy", mmap_mode="r"))

        def gathered(ids: list[int]) -> list[torch.Tensor]:
            return [torch.from_numpy(x[ids]) for x in mapped]

        assert torch.equal(cache[batches[0]].log_probs, gathered(batches[0])[1])
        ways: list[Callable[[list[int]], Any]] = [cache.batch, gathered]
        rates = [[_rate(read, batches) for read in ways] for _ in range(rounds + 1)][1:]
    ours, theirs = (statistics.median(x) for x in zip(*rates, strict=True))
    return ours, theirs


def _rate(read: Callable[[list[int]], Any], batches: list[list[int]]) -> float:
    start = time.process_time()
    for ids in batches:
        read(ids)
    return len(batches) * BATCH * TOKENS / (time.process_time() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours, theirs = cache_reads()
    print(f"cache: {ours / 1e6:.1f} M tokens/s; numpy's memory map: {theirs / 1e6:.1f} M tokens/s")
