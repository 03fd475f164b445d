"""A vocabulary sharded over 2 or 4 processes: values and gradients equal those of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import vocabulary_parallel_processes
from vocabulary_parallel_processes import CASES, SIZES, class_weights, data, several_weights

SCRIPT = Path(vocabulary_parallel_processes.__file__)


def plain(name, z, t, labels):
    """The loss over the full vocabulary from its formula, in float64."""

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    temperature = {"forward_kl": 2.0, "reverse_kl": 3.0, "jsd": 1.0, "ce": 2.0, "mixed": 2.0}[name]
    log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    ce = F.cross_entropy(z.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    values = {
        "forward_kl": 4 * kl(log_p, log_q),
        "reverse_kl": 9 * kl(log_q, log_p),
        "jsd": 0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m),
        "ce": ce,
        "mixed": 0.4 * ce + 0.6 * 4 * kl(log_p, log_q),
    }[name]
    keep = labels != -100
    total = values.where(keep, 0).sum()
    return total if name == "mixed" else total / keep.sum()


@pytest.mark.parametrize("processes", SIZES)
def test_several_processes_have_the_values_and_gradients_of_one(processes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    subprocess.run([*command, str(processes), str(SCRIPT), str(tmp_path)], check=True, timeout=300)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for name in CASES:
        check_loss_and_gradients(results, name)
    check_gradients_of_a_weighted_sum_of_positions(results)
    check_several_tasks(results)
    check_messages_of_refused_calls(results)


def check_loss_and_gradients(results, name):
    x, labels = data()
    hidden, weight, bias = (x[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    logits = hidden @ weight.T + bias
    loss = plain(name, logits, x["teacher"], labels)
    by_logits, *by_head = torch.autograd.grad(2 * loss, [logits, hidden, weight, bias])
    sizes = SIZES[len(results)]
    for rank, result in enumerate(results):
        start = sum(sizes[:rank])
        shard = slice(start, start + sizes[rank])
        expected = {
            "logits": [by_logits[..., shard]],
            "lazy": [by_head[0], by_head[1][shard], by_head[2][shard]],
            "dtensor": [by_logits],
            "lazy dtensor": by_head,
        }
        assert set(result[name]) == set(expected if len(results) == 2 else ["logits", "lazy"])
        for kind, computed in result[name].items():
            torch.testing.assert_close(computed["loss"], loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(computed["grad"], list(expected[kind]), rtol=1e-10, atol=1e-12)


def check_gradients_of_a_weighted_sum_of_positions(results):
    x, _ = data()
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).requires_grad_()
    log_q, log_p = logits.log_softmax(-1), x["teacher"].log_softmax(-1)
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = torch.autograd.grad((values * torch.arange(6).view(2, 3)).sum(), logits)[0]
    computed = torch.cat([result["each position"] for result in results], -1)
    torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)


def check_several_tasks(results):
    x, labels = data()
    leaves = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    z, t, y = (leaves[0] @ leaves[1].T + leaves[2]).view(6, 19), x["teacher"].view(6, 19), labels.view(-1).clamp_min(0)
    log_q, log_p = (z / 2).log_softmax(-1), (t / 2).log_softmax(-1)
    values = torch.stack(
        [
            F.cross_entropy(z, y, class_weights(), label_smoothing=0.2, reduction="none"),
            F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"),
            4 * (log_p.exp() * (log_p - log_q)).sum(-1),
            4 * (log_q.exp() * (log_q - log_p)).sum(-1),
        ]
    )
    by_logits, *by_head = torch.autograd.grad((several_weights() * values).sum(), [z, *leaves])
    sizes = SIZES[len(results)]
    for rank, result in enumerate(results):
        shard = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name in ("several", "lazy several"):
            torch.testing.assert_close(result[name]["values"], values.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            result["several"]["grad"][0].view(6, -1), by_logits[:, shard], rtol=1e-10, atol=1e-12
        )
        expected = [by_head[0], by_head[1][shard], by_head[2][shard]]
        torch.testing.assert_close(list(result["lazy several"]["grad"]), expected, rtol=1e-10, atol=1e-12)


def check_messages_of_refused_calls(results):
    for result in results:
        messages = result["refused"]
        assert "kdloss.ShardedLogits" in messages["whole teacher"]
        assert "closed form" in messages["own divergence"]
        assert "whole vocabulary" in messages["soft labels"]
        assert "whole vocabulary" in messages["hard labels"]
        assert "second derivative" in messages["second derivative"]
