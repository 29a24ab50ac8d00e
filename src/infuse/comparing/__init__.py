"""Comparing methods on one task under one budget: measured, repeated over seeds, resumable."""
