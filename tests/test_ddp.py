"""Two gloo processes give one process's gradients, to the student and to the projections."""

import socket

import torch
import torch.multiprocessing as mp
from families import batch
from two_processes import counted, models, work


def test_hooks_under_ddp_leave_gradients_synchronised_and_equal_to_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    student, criterion, distill = models()
    inputs = batch("gpt2")
    distill(student, **inputs, num_items_in_batch=counted(inputs)).loss.backward()
    for p, a, b in zip([*student.parameters(), *criterion.parameters()], first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, p.grad)
