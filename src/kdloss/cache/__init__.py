"""Store a teacher's most probable classes on disk: run the teacher once, then train without it."""

from kdloss._extras import extra

with extra("hf", "kdloss.cache"):
    from kdloss.cache.read import Cache, open
    from kdloss.cache.tokenizer import tokenizer_hash
    from kdloss.cache.write import write

__all__ = ["Cache", "open", "tokenizer_hash", "write"]
