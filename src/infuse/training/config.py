"""The settings of the commands that train, fuse and average."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from infuse.method import make
from infuse.settings import FromFile
from infuse.training.settings import Settings


@dataclass
class TrainConfig(FromFile, Settings):
    """Train one adapter and leave a run folder."""

    data: str = "sample"
    """A CSV, TSV, JSONL or Parquet file, a folder of splits, a hub data set, banking77, or sample (bundled)."""
    base: str = "minilm"
    """The base model: minilm, a folder, or a hub name such as roberta-base."""
    out: Path | None = None
    """The run folder; by default runs/DATA-BASE-METHOD. An interrupted run in it is resumed."""
    validation: str | None = None
    """Data to choose the best epoch by; by default the data's own validation split, or a part of its rows."""
    test: str | None = None
    """Data to report on once at the end; by default the data's own test split, if it has one."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files (lists in JSONL and Parquet are recognised)."""
    validation_fraction: float = 0.1
    """Share of the rows to validate on where the data has no validation split."""
    baseline: bool = True
    """Fit logistic regression on frozen features as the number to beat."""
    members: tuple[Path, ...] = ()
    """Run folders (or adapters) to fuse, with method: fusion; infuse fuse takes them as arguments too."""
    overwrite: bool = False
    """Replace what the run folder holds, once the new run has succeeded."""

    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        parts = (Path(self.data).stem, Path(self.base).name, make(self.method).name)
        return Path("runs") / "-".join(part.replace("/", "-") for part in parts)


@dataclass
class FuseConfig(TrainConfig):
    """Fuse the adapters of saved runs for a new task (stage two of AdapterFusion)."""

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders (or adapters) to fuse; their adapters stay as they are."""
    member_data: tuple[str, ...] = ()
    """Data sets to train further members on first, each into a run folder beside --out, under the settings given here
    (but for the head and the learning rate, which are the usual ones)."""
    member_method: str = "pfeiffer"
    """The method of the members that are trained first."""
    method: str = "fusion"
    """The mixer and its settings."""


@dataclass
class AverageConfig(FromFile):
    """Average the adapters of saved runs into one (a weighted soup)."""

    runs: Positional[tuple[Path, ...]]
    """Run folders (or adapters) of one method on one base."""
    out: Path = field(default=Path("runs/average"))
    """The folder to write the adapter into."""
    weights: tuple[float, ...] = ()
    """A weight per run; equal by default."""
