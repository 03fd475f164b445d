"""What `pip install kdloss` alone doesn't bring."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Imports that need an extra of the package stand in it: an error says which.

    `name` is the extra's in pyproject.toml, `what` is what needs it, as the user wrote it.

    >>> with extra("hf", "kdloss.cache"):
    ...     import no_such_package
    Traceback (most recent call last):
    ImportError: kdloss.cache needs no_such_package; write: pip install 'kdloss[hf]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "kdloss":
            raise
        raise ImportError(f"{what} needs {package}; write: pip install 'kdloss[{name}]'") from error
