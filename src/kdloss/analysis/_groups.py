"""Which names of a curve belong together."""

from collections.abc import Iterable

FACTORS = ("share", "balance")  # what a term is multiplied by


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The terms, what each is multiplied by, and the parts of each, by a title; titles without names are left out."""
    found: dict[str, list[str]] = {"terms": [], "share": [], "balance": []}
    for name in names:
        term, _, part = name.partition("/")
        found.setdefault(part if part in FACTORS else term if part else "terms", []).append(name)
    return {title: there for title, there in found.items() if there}
