"""Peak memory of one step of KL + CE, in units of one logits tensor; part of `make bench`."""

import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]

from memory import training_memory
from test_losses import ALPHA, TEMPERATURE, TOKENS, VOCAB, plain_recipe

import kdloss


def main() -> None:
    """Count the tensors alive at the peak, both ways."""
    labels = torch.randint(0, VOCAB, (TOKENS,))
    for name, loss in [("plain", plain_recipe), ("kdloss", kdloss.VanillaKD(TEMPERATURE, ALPHA))]:
        student, teacher = torch.randn(TOKENS, VOCAB, requires_grad=True), torch.randn(TOKENS, VOCAB)
        peak = training_memory(
            lambda loss=loss, s=student, t=teacher: loss(s, t, labels).backward(), [student, teacher]
        )
        print(f"{name:>7}: {peak / student.untyped_storage().nbytes():.2f} logits tensors at the peak")


if __name__ == "__main__":
    main()
