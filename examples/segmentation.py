"""Distil a segmentation net: few scenes have labels, and a teacher helps on all scenes.

    python examples/segmentation.py

A scene shows three real digits, with a class for each pixel. Faint ink has the label 255, which is ignored. The student
is 15 times smaller and has labels for some scenes only; all other scenes are 255 everywhere. From the teacher it learns
each pixel's prediction, and where each channel is active (channel-wise distillation, arXiv:2011.13256), on scenes with
and without labels. The student without a teacher takes the same steps on the same scenes.
"""

from collections import OrderedDict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange

import kdloss


def train(name, student, images, labels, steps, teacher=None, temperature=1.0, channels=3.0):
    """Train on the labels; with a teacher, on its predictions, too."""
    criterion = kdloss.CrossEntropy()
    if teacher is not None:  # distillation: two more terms, which also count where there are no labels
        cwd = kdloss.Features(["head"], pairing="same", distance=kdloss.distances.cwd, positions="mask")
        criterion = criterion + kdloss.Logits(temperature=temperature, positions="mask") + channels * cwd
    model = kdloss.Distillation(student, teacher, kdloss.Sum(criterion, layout="b c h w", ignore_index=255)).train()
    optimizer = AdamW(model.parameters(), 1e-2)
    schedule = OneCycleLR(optimizer, 1e-2, steps)
    for _ in trange(steps, desc=name):
        i = torch.randint(len(images), [16])
        model(images[i], labels=labels[i]).loss.backward()  # was: F.cross_entropy(student(images[i]), labels[i], ...)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


def net(width):
    """Convolutions at half the resolution; PixelShuffle turns their 44 channels into logits [B, 11, height, width]."""
    sizes = [(1, width, 2), (width, 2 * width, 1), (2 * width, 2 * width, 1), (2 * width, 2 * width, 1)]
    layers = [layer for i, o, s in sizes for layer in (nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())]
    body = nn.Sequential(*layers, nn.Conv2d(2 * width, 44, 1))
    return nn.Sequential(OrderedDict(body=body, head=nn.PixelShuffle(2)))


def scenes(count, digits, classes):
    """Images of three digits each, and the class of each pixel; 0 is the background."""
    images, labels = torch.zeros(count, 1, 24, 24), torch.zeros(count, 24, 24, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        for i, x, y in zip(torch.randint(len(digits), [3]), *torch.randint(17, [2, 3]).tolist(), strict=True):
            image[0, y : y + 8, x : x + 8] = digits[i]
            label[y : y + 8, x : x + 8] = (digits[i] > 0.1) * 255
            label[y : y + 8, x : x + 8][digits[i] > 0.4] = classes[i] + 1
    return images + 0.1 * torch.randn_like(images), labels


@torch.no_grad()
def mean_iou(model, images, labels):
    """Intersection over union in per cent, averaged over the classes."""
    counts = labels != 255
    found, true = (F.one_hot(classes[counts], 11).bool() for classes in (model(images).argmax(1), labels))
    return 100 * ((found & true).sum(0) / (found | true).sum(0)).nanmean().item()


def main(few: int = 100, temperature: float = 1.0, channels: float = 3.0, steps: int = 500, seed: int = 0):
    """Train a student on few labelled scenes, alone and with a teacher.

    Args:
        few: how many of the student's 600 scenes have labels
        temperature: T of the teacher's term; divides both models' logits
        channels: weight of channel-wise distillation
        steps: steps of each student, with 16 scenes each; the teacher takes 1.5 times as many
        seed: seed of scenes and weights
    """
    torch.manual_seed(seed)
    data = load_digits()
    digits, classes = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
    parts = {2000: slice(1200), 200: slice(1200, None)}  # no digit is in both parts
    (images, labels), (x_test, y_test) = (scenes(n, digits[part], classes[part]) for n, part in parts.items())
    nets = {"teacher": train("teacher", net(48), images, labels, 3 * steps // 2)}
    x, y = images[:600], labels[:600].index_fill(0, torch.arange(few, 600), 255)
    mixed = torch.cat([torch.arange(few).repeat(600 // few), torch.arange(600)])  # about half of a batch has labels
    for name, taught in {"labels alone": (), "with a teacher": (nets["teacher"], temperature, channels)}.items():
        torch.manual_seed(seed)
        nets[name] = train(name, net(12), x[mixed], y[mixed], steps, *taught)
    found = {name: mean_iou(trained, x_test, y_test) for name, trained in nets.items()}
    print("| model | mean IoU on held-out digits, % |\n|---|---|")
    print(*(f"| {name} | {iou:.1f} |" for name, iou in found.items()), sep="\n")
    rows = {"scene": 10 * x_test, "truth": y_test} | {name: n(x_test).argmax(1) for name, n in nets.items()}
    figure, axes = plt.subplots(len(rows), 8, figsize=(10, 6.5), layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for panel, picture in zip(line, pictures[:8].squeeze(1), strict=True):
            shown = picture.float().masked_fill(picture == 255, float("nan")).numpy()
            panel.imshow(shown, "gray_r" if name == "scene" else "tab20", vmin=0, vmax=10)
            panel.set(xticks=[], yticks=[])
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/segmentation.png")
    return found


if __name__ == "__main__":
    tyro.cli(main)
