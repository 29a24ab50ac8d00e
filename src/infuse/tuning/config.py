"""The settings of ``infuse tune``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infuse.errors import InfuseError
from infuse.plain_yaml import read_yaml
from infuse.precision import Precision
from infuse.settings import FromFile, check_kinds
from infuse.training.config import TrainConfig
from infuse.training.settings import Settings
from infuse.units import seconds


@dataclass
class TuneConfig(FromFile):
    """Search methods, their settings, training settings and base models for the best macro-F1 on validation."""

    methods: tuple[str, ...] = ("ia3",)
    """Methods to choose from, e.g. ia3 lora houlsby; a setting given here (lora:rank=4) is held."""
    bases: tuple[str, ...] = ("minilm",)
    """Base models to choose from; each is loaded once."""
    space: tuple[str, ...] = ()
    """What to search or to hold, as YAML: 'epochs: 4' 'learning_rate: {log: [1e-3, 1e-2]}' 'lora: {rank: [4, 8]}'."""
    trials: int = 30
    """Trials of the study, over all workers; those that were pruned count, those of killed workers do not."""
    time: str | None = None
    """No trial starts later than so long after the start of this command: 90s, 10m, 2h."""
    out: Path | None = None
    """The folder for the result; by default runs/tune-DATA. The same command goes on with an interrupted study."""
    storage: str | None = None
    """Where the study lives: postgresql://USER:PASSWORD@HOST/DATABASE for many workers; by default a file in --out."""
    study: str | None = None
    """The study's name in the storage; by default that of the folder."""
    grace: int = 60
    """Seconds without a sign after which a worker is taken for dead and its trial is given to another one."""
    data: str = TrainConfig.data
    """A CSV, TSV, JSONL or Parquet file, a folder of splits, a hub data set, banking77, or sample (bundled)."""
    validation: str | None = None
    """Data to choose by; by default the data's own validation split, or a part of its rows. Test rows play no part."""
    text: str = TrainConfig.text
    """Column of the texts."""
    label: str = TrainConfig.label
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files (lists in JSONL and Parquet are recognised)."""
    validation_fraction: float = TrainConfig.validation_fraction
    """Share of the rows to validate on where the data has no validation split."""
    precision: Precision = "auto"
    """Number format of the frozen trunk; auto takes bf16 where it is faster."""
    max_length: int = Settings.max_length
    """Tokens per text; longer texts are cut."""
    seed: int = 0
    """Seed of the search and of every trial."""

    def check(self) -> None:
        """Raise :class:`InfuseError` for a value that cannot work."""
        check_kinds(self)
        for name in ("methods", "bases"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InfuseError(f"{name} must name at least one, each once.")
        for name, low, high in (("trials", 1, 1_000_000), ("grace", 2, 86_400), ("max_length", 4, 1_000_000)):
            if not low <= getattr(self, name) <= high:
                raise InfuseError(f"{name} must lie between {low} and {high:g}, not {getattr(self, name)}.")
        Settings(seed=self.seed).check()
        _ = self.seconds, self.ranges

    @property
    def seconds(self) -> float | None:
        """The time limit."""
        return None if self.time is None else seconds(self.time)

    @property
    def ranges(self) -> dict[str, Any]:
        """The overrides of the space as one mapping, not yet checked against the settings."""
        merged: dict[str, Any] = {}
        for item in self.space:
            try:
                part = read_yaml(item)
            except ValueError:
                part = None
            if not isinstance(part, dict):
                raise InfuseError(
                    f"{item!r} in the space can't be read: write YAML such as 'epochs: 4' or 'rank: [4, 8]'."
                )
            merged |= {str(name): value for name, value in part.items()}
        return merged

    def folder(self) -> Path:
        return self.out or Path("runs") / f"tune-{Path(self.data).stem}"

    def to_train(self, settings: dict[str, Any]) -> TrainConfig:
        """The configuration of one run of ``infuse train`` on the same data."""
        shared = ("data", "validation", "text", "label", "multi", "validation_fraction")
        return TrainConfig(**{name: getattr(self, name) for name in shared}, **settings)
