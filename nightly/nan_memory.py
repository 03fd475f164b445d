"""A pytest plugin that fills uninitialised memory with NaN, so that a read of it shows up.

`PYTHONPATH=nightly pytest -p nan_memory`
"""

import torch


def pytest_configure() -> None:
    """PyTorch fills the memory of `torch.empty` if deterministic algorithms are on."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
