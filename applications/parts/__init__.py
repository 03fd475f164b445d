"""What the example scripts share: text, models, evaluation, checkpoints, reports. Copy it with a script."""
