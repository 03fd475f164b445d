"""The script of each of two gloo processes: cache_rank.py FOLDER STORE DIES_AT; STORE is a file or "torchrun"."""

import os
import signal
import sys
from pathlib import Path

import caching
import torch
import torch.distributed as dist


def main(folder, store, dies_at):
    torch.set_num_threads(1)
    if store == "torchrun":
        dist.init_process_group("gloo")
    else:
        place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("gloo", init_method=f"file://{store}", **place)
    if dist.get_rank() == 1 and dies_at:
        calls, forward = [], caching.Teacher.forward

        def dying(*args, **settings):
            calls.append(1)
            if len(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(*args, **settings)

        caching.Teacher.forward = dying
    caching.write(folder)
    assert len(caching.kdloss.cache.open(folder, tokenizer=caching.tokenizer())) == 10  # every rank can open it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
