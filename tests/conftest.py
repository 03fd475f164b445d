import gc
import multiprocessing
import os
import sys

import device
import pytest
import torch

device.use()
torch.manual_seed(0)  # what modules draw as they are imported is the same in every run, too


def pytest_collection_modifyitems(items):
    for item in items:
        reason = device.left_out(item.name)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Keep what was imported and collected from being searched in every collection of garbage: 2 s in some tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # code that torch 2.4 compiles for a CPU switches it on


@pytest.fixture(autouse=True)
def _old_torch_compiles_in_pieces(monkeypatch):
    """Allow graph breaks before torch 2.10, which needs them and computes the same values."""
    if torch.__version__ < (2, 10):
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args, fullgraph=False, **options: compiled(*args, **options))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a file of texts for the examples."""
    import tiny

    return tiny.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(data, tmp_path_factory):
    """Return a folder for teachers that contains one trained teacher."""
    import distill_lm
    import tiny
    from parts import options

    folder = tmp_path_factory.mktemp("teachers")
    args = options.read(distill_lm.DEFAULTS, tiny.flags(data, folder, folder), None)
    distill_lm.prepare(args, distill_lm.train)
    return folder


@pytest.fixture(scope="module")
def start():
    """Return a function `start(target, *args)` that starts a process with `hf_runs` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

        def started(target, *args):
            process = context.Process(target=target, args=args)
            process.start()
            return process

        yield started


@pytest.fixture(scope="module")
def run(start):
    """Return a function that runs such a process to its end and returns its exit code."""

    def ran(target, *args):
        process = start(target, *args)
        process.join()
        return process.exitcode

    return ran


@pytest.fixture
def block_sizes(monkeypatch):
    """Compute logits of 3 rows and their loss for 2 rows at a time; returns a function that sets other numbers."""

    def sizes(block, scratch):
        monkeypatch.setattr("kdloss.engine.block_sizes.block_rows", lambda *_: block)
        monkeypatch.setattr("kdloss.engine.block_sizes.scratch_rows", lambda *_: scratch)

    sizes(3, 2)
    return sizes


@pytest.fixture(params=["in blocks", "in one block"])
def every_block_size(request, block_sizes):
    """Run the test with small blocks, then with all rows in one block."""
    if request.param == "in one block":
        block_sizes(100, 100)
