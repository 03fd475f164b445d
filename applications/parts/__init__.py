"""Modules that the applications share: text, models, evaluation, checkpoints, reports. Copy them with a script."""
