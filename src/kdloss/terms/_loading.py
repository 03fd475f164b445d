"""What a checkpoint has learned and a criterion has no place for yet."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def told_to_prepare(criterion: nn.Module, state: Mapping[str, Any], write: str, prefix: str = "") -> Iterator[None]:
    """Inside the `with`, an error in loading says what to write where projections were not built before.

    (torch tells no module whether loading is strict, so that it can't be said from within.)
    """
    try:
        yield
    except RuntimeError as error:
        there = criterion.state_dict(prefix=prefix)
        unbuilt = [key for key in state if key.startswith(f"{prefix}terms.") and key not in there]
        if not unbuilt:
            raise
        raise RuntimeError(
            f"{unbuilt[0]!r} was learned by a criterion, and this one has nothing there yet: if it is the same, "
            f"write {write} before {'model' if prefix else 'criterion'}.load_state_dict(...)"
        ) from error
