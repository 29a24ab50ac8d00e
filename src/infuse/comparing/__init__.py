"""Comparing methods on one task under one budget: measured, repeated over seeds, resumable."""

from infuse.comparing.compare import Comparison as Comparison
from infuse.comparing.compare import compare as compare
from infuse.comparing.settings import CompareConfig as CompareConfig

__all__ = ["CompareConfig", "Comparison", "compare"]
