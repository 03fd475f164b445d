"""A small teacher and its dataset for tests of the cache, without transformers, so that processes start fast."""

import datasets
import torch
from tokenizers import Tokenizer, models
from torch import nn

import kdloss.cache

VOCAB = 40
SETTINGS = {"k": 5, "temperature": 2.0, "batch_size": 2, "shard_size": 4}


class Teacher(nn.Module):
    """A recurrent language model, on which right padding has no effect."""

    def __init__(self, vocabulary=VOCAB, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocabulary, 8)
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, vocabulary)

    def forward(self, input_ids, attention_mask):
        return 4 * self.head(self.dropout(self.gru(self.embedding(input_ids))[0]))


def tokenizer(tokens=VOCAB, first=0):
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(first, first + tokens)}, "w0"))


def bpe(merges=(("a", "b"),), vocabulary=("a", "b", "ab")):
    return Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, list(merges)))


def tokens(examples=10):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (examples,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def dataset(examples=10):
    """A dataset that these settings split into shards of 4, 4 and 2 examples."""
    ids = [f"example {i}" for i in range(examples)]
    return datasets.Dataset.from_dict({"id": ids, "input_ids": tokens(examples)})


def write(folder, teacher=None, data=None, **settings):
    data = dataset() if data is None else data
    settings = {"tokenizer": tokenizer()} | SETTINGS | settings
    kdloss.cache.write(folder, teacher or Teacher(), data, **settings)
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
