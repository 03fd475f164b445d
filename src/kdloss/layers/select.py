"""Select blocks of a model."""

from collections.abc import Callable, Sequence

Layers = str | Sequence[int] | Callable[[int], Sequence[int]]

STRATEGIES: dict[str, Callable[[int], list[int]]] = {
    "auto": lambda depth: [i * depth // min(4, depth) for i in range(min(4, depth))],
    "all": lambda depth: list(range(depth)),
    "key": lambda depth: sorted({0, (depth - 1) // 2, depth - 1}),
    "late": lambda depth: list(range(2 * depth // 3, depth)),
    "last": lambda depth: [depth - 1],
}


def select(layers: Layers, depth: int) -> list[int]:
    """The indices of the selected blocks, for a model with `depth` blocks.

    `layers` is "auto" (4 evenly spaced), "all", "key" (first, middle, last), "late" (last third),
    "last", a list of indices (negative ones count from the end), or any callable that takes the depth
    and returns such a list.

    Raises: ValueError for an unknown strategy, an empty list, an index that is out of range or
    given twice; TypeError for an index that is not an integer.

    >>> select("auto", 12), select("key", 12), select("late", 12), select([0, -1], 12)
    ([0, 3, 6, 9], [0, 5, 11], [8, 9, 10, 11], [0, 11])
    """
    if depth < 1:
        raise ValueError(f"a model needs at least one block, got depth={depth}")
    if isinstance(layers, str):
        return strategy(layers)(depth)
    chosen = list(layers(depth)) if callable(layers) else list(layers)
    if not chosen:
        raise ValueError(f"layers is empty; choose some of the {depth} blocks, or layers='auto'")
    indices = [index(i, depth) for i in chosen]
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers={chosen} names a block twice (of {depth}: {indices})")
    return indices


def strategy(name: str) -> Callable[[int], list[int]]:
    """The selection with this name."""
    if name not in STRATEGIES:
        raise ValueError(
            f"layers={name!r} is unknown; choose one of {list(STRATEGIES)}, or give a list of indices "
            "or module names, or a callable of the depth"
        )
    return STRATEGIES[name]


def index(i: int, depth: int, whose: str = "") -> int:
    """Check a block's index and count it from the start."""
    if isinstance(i, bool) or not isinstance(i, int):
        raise TypeError(f"a {whose}block is named by an integer, got {type(i).__name__}: {i!r}")
    if not -depth <= i < depth:
        raise ValueError(f"{whose}block {i} does not exist: {depth} blocks, {-depth} to {depth - 1}")
    return i % depth
