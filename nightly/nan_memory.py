"""A pytest plugin: memory that nobody has written to yet is NaN, so that whoever reads it is seen.

`PYTHONPATH=nightly pytest -p nan_memory`
"""

import torch


def pytest_configure() -> None:
    """PyTorch fills what `torch.empty` gives where algorithms are to be deterministic."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
