"""Distillation in Hugging Face's `Trainer`, or in any class that inherits from it; it needs `kdloss[hf]`."""

from kdloss._extras import extra

with extra("hf", "kdloss.hf"):
    from kdloss.hf.checkpoints import newest_complete
    from kdloss.hf.trainer import DistillationTrainer, Distilling

__all__ = ["DistillationTrainer", "Distilling", "newest_complete"]
