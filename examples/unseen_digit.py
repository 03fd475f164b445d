"""Hinton's unseen digit: a student that never sees a 3 learns from its teacher to read 3s.

    python examples/unseen_digit.py

The student learns about 3s only from the probability of a 3 that the teacher gives to other digits. Because it never
saw a 3, it predicts too few. The paper corrects this by raising the bias of that class; here, to the value with the
fewest validation errors. The student from labels has the same images and steps. Hinton et al. 2015, arXiv:1503.02531.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from datasets import load_dataset
from einops import rearrange
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from tqdm import trange

import kdloss


def train(student, images, labels, steps, teacher=None, temperature=20.0, lr=3e-3):
    """Train on the labels; with a teacher, on its probabilities instead."""
    # distillation: alpha is the weight of the labels
    criterion = kdloss.VanillaKD(temperature, alpha=0.0 if teacher else 1.0)
    model = kdloss.Distillation(student, teacher, criterion).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in trange(steps, desc="from a teacher" if teacher else "from labels", leave=False):
        some = torch.randint(len(images), [128])
        i, j = torch.randint(3, [2]).tolist()  # shift by a pixel at most
        x = F.pad(images[some], (1, 1, 1, 1))[..., i : i + images.shape[2], j : j + images.shape[3]]
        loss = model(x, labels=labels[some]).loss  # was: F.cross_entropy(student(x), labels[some])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


def cnn(width):
    """Three convolutions and a linear layer."""
    body = [nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    body += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32 * width, 10))


def load(data):
    """Images [N, 1, height, width] and labels [N]."""
    if data is None:
        digits = load_digits()  # 1 797 real ones, 8 x 8
        return torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
    rows = load_dataset(data, split="train").with_format("torch")
    return torch.stack([F.avg_pool2d(x[:1] / 255, 2) for x in rows["image"]]), torch.tensor(list(rows["label"]))


@torch.no_grad()
def read(model, images, digit, bias=0.0):
    """The predicted digits, with `bias` added to the logit of one digit."""
    return (model(images) + bias * F.one_hot(torch.tensor(digit), 10)).argmax(1)


def main(
    data: str | None = None, digit: int = 3, temperature: float = 20.0, steps: int = 800, seeds: int = 3
) -> dict[str, float]:  # fmt: skip
    """Train students without the images of one digit, from labels and from a teacher.

    Args:
        data: folder with one folder of images per digit, or name of a data set; without it, scikit-learn's digits
        digit: the digit that the students never see
        temperature: T of the teacher's term; divides both models' logits
        steps: steps of 128 images, for the teacher and for each student
        seeds: number of students of each kind
    """
    x, y = load(data)
    order = torch.randperm(len(x), generator=torch.manual_seed(0))
    known, dev, test = order.tensor_split([len(x) // 2, len(x) * 3 // 4])
    teacher = train(cnn(16), x[known], y[known], steps)
    seen = known[y[known] != digit]
    answers = {"teacher": [read(teacher, x[test], digit)]}
    for seed in range(seeds):
        for name, taught in {"from labels": None, "from the teacher": teacher}.items():
            torch.manual_seed(seed)
            student = train(cnn(8), x[seen], y[seen], steps, taught, temperature)
            misread = [(read(student, x[dev], digit, bias / 4) != y[dev]).sum() for bias in range(40)]
            for more, bias in {"": 0, ", bias corrected": misread.index(min(misread)) / 4}.items():
                answers.setdefault(name + more, []).append(read(student, x[test], digit, bias))
    found, unseen = {}, y[test] == digit
    print(f"| model | errors on {digit}s, % | errors on all digits, % |\n|---|---|---|")
    figure, panels = plt.subplots(1, len(answers), figsize=(16, 3.6), layout="constrained")
    for panel, (name, given) in zip(panels, answers.items(), strict=True):
        wrong = 100.0 * (torch.stack(given) != y[test])
        errors = wrong[:, unseen].mean(1), wrong.mean(1)
        print(f"| {name} | {' | '.join(f'{e.mean():.1f} ± {e.std(correction=0):.1f}' for e in errors)} |")
        found[name] = errors[0].mean().item()
        colour = torch.tensor([[0.0, 0.5, 0.1], [0.8, 0.0, 0.0]])[wrong[-1, unseen].bool().long()]
        sheet = 1 - F.pad(x[test][unseen][:, 0], (1, 1, 1, 1))[..., None] * (1 - colour[:, None, None])
        panel.imshow(rearrange(sheet[: len(sheet) // 7 * 7], "(r c) h w rgb -> (r h) (c w) rgb", c=7).numpy())
        panel.set_title(f"{name}\n{errors[0][-1]:.0f} % of {digit}s misread", fontsize=10)
        panel.axis("off")
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/unseen_digit.png")
    return found


if __name__ == "__main__":
    tyro.cli(main)
