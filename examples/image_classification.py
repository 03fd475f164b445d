"""Distil an image classifier: a small ResNet with few labelled images learns from a larger ResNet.

    python examples/image_classification.py
    python examples/image_classification.py --data cifar10        # or a folder with one folder of images per class

The teacher, a ResNet with 32 to 128 channels, trains on two thirds of 1 797 handwritten digits. The student has 8 to 32
channels and few of these images. It learns the teacher's logits and attention maps (attention transfer,
arXiv:1612.03928) on mixed images (mixup, arXiv:1710.09412). Every student takes the same number of steps; a step with a
teacher takes longer. The published weight of attention transfer, 1000, is for SGD and is too large for AdamW; at weight
1 the term neither helps nor harms much here.
"""

import torch
import tyro
from datasets import load_dataset
from sklearn.datasets import load_digits
from torch.distributions import Beta
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange
from transformers import ResNetConfig, ResNetForImageClassification

import kdloss


def train(name, student, images, labels, steps, teacher=None, alpha=1.0, temperature=4.0, attention=0.0):
    """Train on mixed images: from labels alone, or from labels and a teacher."""
    # distillation: labels, the teacher's logits, and the attention maps of two stages
    stages = ["resnet.encoder.stages.1", "resnet.encoder.stages.2"]
    maps = kdloss.Features(stages, pairing="same", distance=kdloss.distances.attention_transfer)
    criterion = alpha * kdloss.CrossEntropy() + (1 - alpha) * kdloss.Logits(temperature=temperature) + attention * maps
    model = kdloss.Distillation(student, teacher, criterion).train()
    optimizer = AdamW(model.parameters(), 3e-3)
    schedule = OneCycleLR(optimizer, 3e-3, steps)
    for _ in trange(steps, desc=name):
        i = torch.randint(len(images), [64])
        mix, x, y = Beta(0.4, 0.4).sample(), images[i], F.one_hot(labels[i], student.config.num_labels).float()
        x, y = mix * x + (1 - mix) * x.flip(0), mix * y + (1 - mix) * y.flip(0)
        i, j = torch.randint(9, [2]).tolist()  # shift by four pixels at most
        loss = model(F.pad(x, (4, 4, 4, 4))[..., i : i + 32, j : j + 32], labels=y).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return student.eval()


def resnet(images, labels, width):
    """A new ResNet with three stages."""
    classes, sizes = int(labels.max()) + 1, [width, 2 * width, 4 * width]
    shape = {"embedding_size": width, "hidden_sizes": sizes, "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=images.shape[1], num_labels=classes, **shape))


@torch.no_grad()
def errors(model, images, labels):
    """The error rate in per cent."""
    wrong = [model(x).logits.argmax(1) != y for x, y in zip(images.split(256), labels.split(256), strict=True)]
    return 100 * torch.cat(wrong).float().mean().item()


def load(data):
    """Images [N, channels, 32, 32] and labels [N]."""
    if data is None:
        digits = load_digits()
        images, labels = [torch.tensor(digits.images[:, None] * 16)], digits.target
    else:
        rows = load_dataset(data, split="train").with_format("torch")
        columns = list(rows.features)
        images, labels = [x[None] for x in rows[columns[0]]], list(rows[columns[1]])
    return torch.cat([F.interpolate(x / 255.0, (32, 32), mode="bilinear") for x in images]).float(), torch.tensor(
        labels
    )


def main(
    data: str | None = None, few: int = 60, alpha: float = 0.1, temperature: float = 4.0, attention: float = 1.0,
    steps: int = 400, seed: int = 0
) -> dict[str, float]:  # fmt: skip
    """Train a student on few labels, alone and with a teacher.

    Args:
        data: name of a data set, or folder with one folder of images per class; without it, scikit-learn's digits
        few: number of images that the student has
        alpha: weight of the labels; the weight of the teacher's logits is 1 - alpha
        temperature: T of the teacher's term; divides both models' logits
        attention: weight of attention transfer
        steps: steps of 64 images, for the teacher and for each student
        seed: seed of the student's weights and images
    """
    images, labels = load(data)
    order = torch.randperm(len(images), generator=torch.manual_seed(0))
    known, test = order.tensor_split([len(order) * 2 // 3])
    teacher = train("teacher", resnet(images, labels, 32), images[known], labels[known], steps)
    found = {"teacher": errors(teacher, images[test], labels[test])}
    logits, both = (teacher, alpha, temperature), (teacher, alpha, temperature, attention)
    methods = {"labels alone": (), "teacher's logits": logits, "logits and attention": both}
    for name, taught in methods.items():
        torch.manual_seed(seed)
        some = known[torch.randperm(len(known))[:few]]
        student = train(name, resnet(images, labels, 8), images[some], labels[some], steps, *taught)
        found[name] = errors(student, images[test], labels[test])
    print("| model | errors on held-out images, % |\n|---|---|")
    print(*(f"| {name} | {error:.1f} |" for name, error in found.items()), sep="\n")
    return found


if __name__ == "__main__":
    tyro.cli(main)
