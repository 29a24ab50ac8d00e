"""Training: one path for all methods, on transformers' Trainer."""

from infuse.training.fit import Fitted as Fitted
from infuse.training.fit import fit as fit
from infuse.training.settings import Settings as Settings

__all__ = ["Fitted", "Settings", "fit"]
