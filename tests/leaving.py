"""End a process of a test after it has used DDP on gloo."""

import os
import sys

import torch.distributed as dist


def leave():
    """Wait for all processes, then exit without any cleanup.

    torch 2.13's DDP destroys its process group while it holds the interpreter's lock. A gloo thread may need that lock
    to release its last tensor, and then the process sometimes hangs or aborts.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
