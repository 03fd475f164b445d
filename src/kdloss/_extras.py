"""The error for a package that only an extra of kdloss installs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Wrap imports that need an extra of the package: if one fails, the error says which extra to install.

    `name` is the extra's name in pyproject.toml; `what` needs it, written as the user wrote it.

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
