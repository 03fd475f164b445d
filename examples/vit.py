"""Distil a vision transformer with two heads (DeiT): labels for one, a CNN teacher's decisions for the other.

    python examples/vit.py

The teacher, a CNN, trains on two thirds of 1 797 handwritten digits. The student, a small DeiT, sees the same images
but has few labels. Its class token learns the labels; its distillation token learns the teacher's most likely class,
also on images without a label. The student's answer is the mean of both heads. Without a teacher both heads learn the
labels, for as many steps on the same images. Touvron et al. 2021, arXiv:2012.12877.
"""

import torch
import tyro
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

import kdloss


def two_heads(alpha, teacher):
    """Labels for one head; for the other head the teacher's decisions or, without a teacher, the labels, too."""
    # distillation: `take` is the head that a term reads; "mask" also counts images without a label
    first = kdloss.CrossEntropy(take="cls_logits", name="labels")
    second = kdloss.CrossEntropy(take="distillation_logits", name="labels too")
    if teacher is not None:
        hard, head = kdloss.divergences.hard_labels, "distillation_logits"
        second = kdloss.Logits(hard, take=head, teacher_take=None, positions="mask", name="decisions")
    return alpha * first + (1 - alpha) * second


def train(name, student, images, labels, steps, criterion, teacher=None, lr=3e-3):
    """Train the student and the criterion as one module, called like the student."""
    model = kdloss.Distillation(student, teacher, criterion).train()
    optimizer = AdamW(model.parameters(), lr)
    schedule = OneCycleLR(optimizer, lr, steps)
    for _ in trange(steps, desc=name):
        i = torch.randint(len(images), [64])
        loss = model(images[i], labels=labels[i]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


def cnn(width):
    """Three convolutions and a linear layer."""
    body = [nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    body += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32 * width, 10))


def deit(width, depth):
    """A small DeiT for images of 8 x 8 pixels, in four patches."""
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": width, "num_hidden_layers": depth}
    more = {"num_attention_heads": 4, "intermediate_size": 2 * width, "num_labels": 10, "initializer_range": 0.1}
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**shape, **more))


@torch.no_grad()
def errors(logits, labels):
    """The error rate in per cent."""
    return 100 * (logits.argmax(1) != labels).float().mean().item()


def main(few: int = 60, alpha: float = 0.5, steps: int = 400, lr: float = 3e-3, seeds: int = 2) -> dict[str, float]:
    """Train a DeiT on few labels, alone and with a teacher.

    Args:
        few: number of labels that the student has
        alpha: weight of the labels; the weight of the teacher's decisions is 1 - alpha
        steps: steps of 64 images, for each model
        lr: peak learning rate
        seeds: number of students of each kind
    """
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None]).float() / 6 - 0.8, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.manual_seed(0))
    (x, x_test), (y, y_test) = (z[order].tensor_split([1200]) for z in (images, labels))
    teacher = train("teacher", cnn(16), x, y, steps, 1.0 * kdloss.CrossEntropy())
    found = {"teacher": [[errors(teacher(x_test), y_test)]]}
    for seed in range(seeds):
        torch.manual_seed(seed)
        some = torch.randperm(len(x))[:few]
        known = torch.full_like(y, -100)
        known[some] = y[some]
        mixed = torch.cat([some.repeat(len(x) // few), torch.arange(len(x))])  # about half of a batch has labels
        for name, taught in {"labels alone": None, "with a teacher": teacher}.items():
            torch.manual_seed(seed)
            student = train(name, deit(48, 3), x[mixed], known[mixed], steps, two_heads(alpha, taught), taught, lr)
            out = student(x_test)
            heads = out.logits, out.cls_logits, out.distillation_logits  # the first is the mean of the others
            found.setdefault(name, []).append([errors(head, y_test) for head in heads])
    print(
        "errors on held-out images, %\n\n| model | both heads | class token | distillation token |\n|---|---|---|---|"
    )
    for name, each in found.items():
        cells = [f"{error:.1f}" for error in torch.tensor(each).mean(0)]
        print(f"| {name} | {' | '.join(cells + [''] * (3 - len(cells)))} |")
    return {name: sum(errors[0] for errors in each) / len(each) for name, each in found.items()}


if __name__ == "__main__":
    tyro.cli(main)
