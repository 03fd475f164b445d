"""A vocabulary over several processes: values and gradients of one process, for 2 and 4 of them."""

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
    """The formula over the whole vocabulary, position by position, in float64."""

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
        value_and_gradients_are_those_of_the_whole_vocabulary(results, name)
    any_gradient_from_above_reaches_every_position(results)
    several_tasks_are_those_of_the_whole_vocabulary(results)
    what_a_shard_cannot_do_is_said(results)


def value_and_gradients_are_those_of_the_whole_vocabulary(results, name):
    x, labels = data()
    hidden, weight, bias = (x[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    logits = hidden @ weight.T + bias
    loss = plain(name, logits, x["teacher"], labels)
    by_logits, *by_head = torch.autograd.grad(2 * loss, [logits, hidden, weight, bias])
    sizes = SIZES[len(results)]
    for rank, result in enumerate(results):
        start = sum(sizes[:rank])
        mine = slice(start, start + sizes[rank])
        expected = {
            "logits": [by_logits[..., mine]],
            "lazy": [by_head[0], by_head[1][mine], by_head[2][mine]],
            "dtensor": [by_logits],
            "lazy dtensor": by_head,
        }
        assert set(result[name]) == set(expected if len(results) == 2 else ["logits", "lazy"])
        for kind, found in result[name].items():
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(found["grad"], list(expected[kind]), rtol=1e-10, atol=1e-12)


def any_gradient_from_above_reaches_every_position(results):
    x, _ = data()
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).requires_grad_()
    log_q, log_p = logits.log_softmax(-1), x["teacher"].log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    whole = torch.autograd.grad((each * torch.arange(6).view(2, 3)).sum(), logits)[0]
    found = torch.cat([result["each position"] for result in results], -1)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)


def several_tasks_are_those_of_the_whole_vocabulary(results):
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
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name in ("several", "lazy several"):
            torch.testing.assert_close(result[name]["values"], values.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result["several"]["grad"][0].view(6, -1), by_logits[:, mine], rtol=1e-10, atol=1e-12)
        expected = [by_head[0], by_head[1][mine], by_head[2][mine]]
        torch.testing.assert_close(list(result["lazy several"]["grad"]), expected, rtol=1e-10, atol=1e-12)


def what_a_shard_cannot_do_is_said(results):
    for result in results:
        said = result["refused"]
        assert "kdloss.ShardedLogits" in said["whole teacher"]
        assert "closed form" in said["own divergence"]
        assert "whole vocabulary" in said["soft labels"]
        assert "whole vocabulary" in said["hard labels"]
        assert "second derivative" in said["second derivative"]
