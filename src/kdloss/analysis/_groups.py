"""Group the names of a curve."""

from collections.abc import Iterable

FACTORS = ("share", "balance")  # what a term is multiplied by


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by group: the terms, their factors, and the layers of each term. Empty groups are left out."""
    found: dict[str, list[str]] = {"terms": [], "share": [], "balance": []}
    for name in names:
        term, _, part = name.partition("/")
        found.setdefault(part if part in FACTORS else term if part else "terms", []).append(name)
    return {title: there for title, there in found.items() if there}
