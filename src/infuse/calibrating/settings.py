"""The settings of a calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from infuse.settings import FromFile


@dataclass
class CalibrateConfig(FromFile):
    """Fit a run's confidences, and the threshold below which a text is out of scope, to labelled rows."""

    run: Positional[Path]
    """A run folder, or an adapter's folder; its adapter's file is replaced."""
    data: str | None = None
    """Labelled rows that were not trained on: a file, folder, hub data set, or sample; by default the rows that the
    run was validated on."""
    split: str = "validation"
    """Which split, where the data has several."""
    out_of_scope: str | None = None
    """Texts that no label fits (a file, say); the threshold then separates them from the rows as well as it can."""
    keep: float | None = None
    """Without --out-of-scope: the share of the rows that the threshold keeps; by default 0.95."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files; such runs get a temperature only."""
    base: str | None = None
    """The base model, if it is not found under the name used in training."""
    format: Literal["table", "json"] = "table"
    """How to print."""
