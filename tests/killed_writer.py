"""Kill the writer of a cache by SIGKILL at each of its calls in turn, and check that a second writer completes it.

Run as `python tests/killed_writer.py FOLDER`. Each writer is a forked process. Prints the number of calls, and the
number of killed writers that left a partial cache.
"""

import itertools
import os
import pathlib
import signal
import sys
import traceback

import caching
import torch

left = 0


def die_in(owner, name, part=lambda *args: None):
    """Count the calls of a function. The call whose turn it is does part of its work and kills the process."""
    original = getattr(owner, name)

    def call(*args, **settings):
        global left
        left -= 1
        if left == 0:
            part(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **settings)

    setattr(owner, name, call)


def write_half_of_a_shard(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])


def write_half_of_a_text(path, text, **settings):
    with path.open("w") as file:
        file.write(text[: len(text) // 2])


def run_forked(work, *arguments):
    """Run a function in a forked process, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_until_killed(folder, turn):
    global left
    left = turn
    die_in(caching.Teacher, "forward")
    die_in(pathlib.Path, "write_bytes", write_half_of_a_shard)
    die_in(pathlib.Path, "write_text", write_half_of_a_text)
    die_in(os, "fsync")
    die_in(os, "replace")
    caching.write(folder)


def main(folder):
    torch.set_num_threads(1)
    data = caching.dataset()
    caching.dataset = lambda: data
    expected = caching.contents(caching.write(folder / "undisturbed"))
    left_over = 0
    for turn in itertools.count(1):
        target = folder / f"killed-{turn}"
        if run_forked(write_until_killed, target, turn) == 0:  # the writer makes fewer calls
            break
        left_over += bool(list(target.glob("*.partial")))
        if turn % 2:  # kill every other writer once more, at its third call
            run_forked(write_until_killed, target, 3)
        assert run_forked(caching.write, target) == 0
        assert caching.contents(target) == expected, f"killed at instant {turn}"
    print(turn - 1, left_over)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
