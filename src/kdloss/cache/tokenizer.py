"""Identify a tokenizer by its content."""

import hashlib
import json
from typing import Any


def tokenizer_hash(tokenizer: Any) -> str:
    """A SHA-256 of the vocabulary of a `tokenizer`, and of its merges if it has some.

    It does not depend on the process or on where the tokenizer was saved. In tokenizers with the same hash, ids have
    the same meaning. Pre-tokenisation and templates are not part of the hash.

    Raises: TypeError for an object without `get_vocab()`.

    >>> from tokenizers import Tokenizer, models
    >>> one, two = ({"a": 0, "b": 1}, {"b": 0, "a": 1})
    >>> tokenizer_hash(Tokenizer(models.BPE(one, []))) == tokenizer_hash(Tokenizer(models.BPE(two, [])))
    False
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise TypeError(f"tokenizer needs get_vocab(), got {type(tokenizer).__name__}")
    content = [sorted(tokenizer.get_vocab().items()), _merges(tokenizer)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _merges(tokenizer: Any) -> list[list[str]]:
    to_str = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "to_str", None)
    if to_str is not None:
        merges = json.loads(to_str())["model"].get("merges") or []
        return [m.split(" ") if isinstance(m, str) else list(m) for m in merges]  # older files have "a b"
    ranks = getattr(tokenizer, "bpe_ranks", None) or {}
    return [list(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
