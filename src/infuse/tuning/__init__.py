"""Tuning: a search over methods, their settings, training settings and base models, on Optuna."""

from infuse.tuning.config import TuneConfig as TuneConfig
from infuse.tuning.run import Tuned as Tuned
from infuse.tuning.run import tune as tune

__all__ = ["TuneConfig", "Tuned", "tune"]
