"""Training: one path for all methods, on transformers' Trainer."""
