"""A better error for checkpoints with projections that a criterion has not built yet."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def told_to_prepare(criterion: nn.Module, state: Mapping[str, Any], write: str, prefix: str = "") -> Iterator[None]:
    """Inside the `with`, an error in loading says what to write if projections were not built before.

    (torch doesn't tell a module whether loading is strict, so the module itself can't say it.)
    """
    try:
        yield
    except RuntimeError as error:
        there = criterion.state_dict(prefix=prefix)
        unbuilt = [key for key in state if key.startswith(f"{prefix}terms.") and key not in there]
        if not unbuilt:
            raise
        raise RuntimeError(
            f"the checkpoint has the parameter {unbuilt[0]!r}, which this criterion has not built yet: if it is the "
            f"same criterion, write {write} before {'model' if prefix else 'criterion'}.load_state_dict(...)"
        ) from error
