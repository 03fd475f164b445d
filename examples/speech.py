"""Speech recognition with CTC: a small wav2vec2 learns from few recordings and a larger wav2vec2.

The recordings are telephone numbers dialled in touch tones, with noise, made at run time. The teacher trains on 2000
numbers, both students on 40, for the same number of steps. CTC labels do not say which frame holds which key; the
teacher's logits do. To use your own recordings, replace `number` and `wav2vec2`.
"""

import copy
import random

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import char_error_rate
from tqdm import trange
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, set_seed

import kdloss


def train(name, student, recordings, steps, lr, teacher=None, alpha=0.5, temperature=2.0, batch_size=16):
    """The usual training loop. With a teacher, it trains a `Distillation` instead of the student alone."""
    model = student
    if teacher is not None:
        # distillation: the student's own CTC loss, and the teacher's logits at every frame
        criterion = alpha * kdloss.Task() + (1 - alpha) * kdloss.Logits(temperature=temperature)
        model = kdloss.Distillation(student, teacher, criterion)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := trange(steps, desc=name)):
        loss = model.train()(**collate(random.sample(recordings, batch_size))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return student.eval()


KEYS = " 123A456B789C*0#D"  # label 0 is CTC's blank
ROWS, COLUMNS = torch.tensor([697.0, 770.0, 852.0, 941.0]), torch.tensor([1209.0, 1336.0, 1477.0, 1633.0])


def number(noise=0.5, rate=4000):
    """A random number of three to six keys of 40 to 70 ms each, as sound and as labels."""
    keys, sound = torch.randint(16, (random.randint(3, 6),)), [torch.zeros(random.randint(40, 200))]
    for key in keys.tolist():
        time = 2 * torch.pi * (torch.arange(random.randint(160, 280)) / rate + torch.rand(()))
        sound += [(ROWS[key // 4] * time).sin() + (COLUMNS[key % 4] * time).sin(), torch.zeros(random.randint(60, 200))]
    return (sound := torch.cat(sound)) + noise * torch.randn_like(sound), keys + 1


def collate(recordings):
    """Make a batch for `Wav2Vec2ForCTC`."""
    sounds, labels = zip(*recordings, strict=True)
    mask = pad_sequence([torch.ones(len(sound), dtype=torch.long) for sound in sounds], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_values": pad_sequence(sounds, batch_first=True), "attention_mask": mask, "labels": labels}


def wav2vec2(width, depth):
    """A new wav2vec2 with 64 samples per frame."""
    return Wav2Vec2ForCTC(Wav2Vec2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=2 * width, layerdrop=0.0,
        conv_dim=(width, width), conv_kernel=(64, 3), conv_stride=(32, 2), num_feat_extract_layers=2,
        feat_extract_norm="layer", do_stable_layer_norm=True, num_conv_pos_embeddings=15, vocab_size=len(KEYS),
        ctc_loss_reduction="mean", ctc_zero_infinity=True, mask_time_prob=0.0,
    ))  # fmt: skip


@torch.no_grad()
def errors(model, recordings):
    """Wrong, missing and extra keys per 100 keys; the key of a frame is its most likely one."""
    batch = collate(recordings)
    frames = model(batch["input_values"], batch["attention_mask"]).logits.argmax(-1)
    lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    heard = [x[:n].unique_consecutive() for x, n in zip(frames, lengths, strict=True)]
    heard, said = (["".join(KEYS[i] for i in x if i > 0) for x in side] for side in (heard, batch["labels"]))
    return 100 * char_error_rate(heard, said).item()


def main(
    numbers: int = 40, steps: int = 300, lr: float = 3e-3, alpha: float = 0.5, temperature: float = 2.0, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Train a student alone and with a teacher; test on 300 numbers that no model was trained on.

    Args:
        numbers: number of recordings that the students have
        steps: steps of each student; the teacher takes twice as many
        lr: peak learning rate
        alpha: weight of the student's own loss; the teacher's weight is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        seed: seed of recordings, weights and batches
    """
    set_seed(seed)
    test, known, small = [number() for _ in range(300)], [number() for _ in range(2000)], wav2vec2(32, 1)
    teacher = train("teacher", wav2vec2(64, 2), known, 2 * steps, lr)
    alone = train("alone", copy.deepcopy(small), known[:numbers], steps, lr)
    distilled = train("distilled", small, known[:numbers], steps, lr, teacher, alpha, temperature)
    found = {}
    print("| model | parameters | wrong keys in 100 |\n|---|---|---|")
    for name, model in {"teacher": teacher, "alone": alone, "distilled": distilled}.items():
        found[name] = errors(model, test)
        print(f"| {name} | {model.num_parameters():,} | {found[name]:.1f} |")
    return found


if __name__ == "__main__":
    tyro.cli(main)
