"""A training step with logits or features, and with features in the naive way: `make bench`."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import kdloss


def model(depth, width):
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    shape = GPT2Config(n_layer=depth, n_embd=width, n_head=4, vocab_size=2048, n_positions=128, **special)
    return GPT2LMHeadModel(shape)


@pytest.fixture
def pair():
    return model(12, 192), model(4, 192), torch.randint(0, 2048, (8, 128))


@pytest.mark.benchmark(group="one step, 12 blocks to 4, width 192, 8 x 128 tokens")
@pytest.mark.parametrize("way", ["vanilla", "feature", "old way"])
@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
def test_step(benchmark, pair, way):
    teacher, student, tokens = pair
    criteria = {
        "vanilla": kdloss.VanillaKD(),
        "feature": kdloss.FeatureKD(pairing=[(0, 0), (2, 4)]),
    }

    def old_way():
        """Run the full teacher, and the student twice: for its loss and for its features."""
        with torch.no_grad():
            target = teacher(tokens, output_hidden_states=True).hidden_states
        logits = student(tokens, labels=tokens).loss
        hidden = student(tokens, output_hidden_states=True).hidden_states
        return 0.3 * logits + 0.7 * sum(F.mse_loss(hidden[i + 1], target[j + 1]) for i, j in [(0, 0), (2, 4)]) / 2

    if way == "old way":
        step = old_way
    else:
        distill = kdloss.Distiller(teacher, criteria[way]).prepare(student)

        def step():
            return distill(student, input_ids=tokens, labels=tokens).loss

    benchmark(lambda: step().backward())
    assert all(p.grad is not None for p in student.parameters())
