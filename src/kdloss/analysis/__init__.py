"""What to look at: how alike the blocks of two models are."""

from kdloss.analysis.cka import CKAMatrix, cka_matrix

__all__ = ["CKAMatrix", "cka_matrix"]
