"""Tuning: a search over methods, their settings, training settings and base models, on Optuna."""
