"""The settings of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infuse.errors import InfuseError
from infuse.method import Method, make, registry
from infuse.precision import Precision
from infuse.settings import FromFile, check_kinds
from infuse.training.settings import Settings


@dataclass
class CompareConfig(FromFile):
    """Compare methods on your data under one budget, and leave a report."""

    data: str = "sample"
    """A CSV, TSV, JSONL or Parquet file, a folder of splits, a hub data set, banking77, or sample (bundled)."""
    base: tuple[str, ...] = ("minilm",)
    """Base models: minilm, folders, or hub names such as roberta-base bert-base-uncased."""
    methods: tuple[str, ...] = ()
    """Methods to compare, e.g. ia3 lora:rank=4 full; by default all methods and presets, head and full."""
    seeds: int = 3
    """How many times each method is trained; the seeds count up from --seed."""
    epochs: int = 4
    """Passes over the training rows; the best one on validation is kept."""
    time: float | None = None
    """Seconds of training for every run, instead of --epochs: as many whole epochs as fit, measured for each method."""
    out: Path | None = None
    """The folder of the comparison; by default runs/compare-DATA. What is finished in it is not run again."""
    validation: str | None = None
    """Data to choose the best epoch by; by default the data's own validation split, or a part of its rows."""
    test: str | None = None
    """Data that is never used to choose; by default the data's own test split, if it has one."""
    report_on: Literal["validation", "test"] = "validation"
    """The rows to report on. Compare on validation, and look at test once, when the choice is made."""
    text: str = "text"
    """Column of the texts."""
    label: str = "label"
    """Column of the labels."""
    multi: bool = False
    """Several labels a row, separated by | in CSV files (lists in JSONL and Parquet are recognised)."""
    validation_fraction: float = 0.1
    """Share of the rows to validate on where the data has no validation split."""
    probe: str = "probe"
    """Labelled texts of another domain, to measure forgetting on; by default 144 bundled ones on everyday topics."""
    baseline: bool = True
    """Fit logistic regression on frozen features as the number to beat."""
    layers: str = "all"
    """Which layers to adapt: all, last:2, first:2, or indices such as 0,3."""
    head: Literal["cosine", "linear"] = "cosine"
    """cosine: started at the class centroids; linear: started at zero."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """How token vectors become one vector; auto: what the base says, else by its architecture."""
    batch_size: int = 32
    """Rows per optimizer step."""
    max_length: int = 128
    """Tokens per text; longer texts are cut."""
    class_weights: bool = False
    """Weigh labels by the inverse of their frequency."""
    precision: Precision = "auto"
    """Number format of the frozen trunk; full fine-tuning always runs in fp32."""
    seed: int = 0
    """The first seed, and that of the validation split."""
    overwrite: bool = False
    """Begin anew instead of going on with what the folder holds."""

    def folder(self) -> Path:
        return self.out or Path("runs") / f"compare-{Path(self.data).stem.replace('/', '-')}"

    def chosen(self) -> list[str]:
        """The methods to compare, each once, as :func:`infuse.make` understands them."""
        return unique(self.methods) if self.methods else every_method()

    def settings(self, method: str, seed: int, epochs: int | None = None) -> Settings:
        """How one run is trained. Nothing stops early: all have the same budget."""
        same = ("layers", "head", "pooling", "batch_size", "max_length", "class_weights", "precision")
        own = {name: getattr(self, name) for name in same}
        return Settings(method=method, seed=seed, epochs=epochs or self.epochs, patience=0, **own)

    def check(self) -> None:
        """Raise :class:`InfuseError` for a value that cannot work."""
        check_kinds(self)
        for name, low, high in (("seeds", 1, 1000), ("epochs", 1, 10_000)):
            if not low <= getattr(self, name) <= high:
                raise InfuseError(f"{name} must lie between {low} and {high}, not {getattr(self, name)}.")
        if self.time is not None and not 0 < self.time < 1e7:
            raise InfuseError(f"time must be a positive number of seconds, not {self.time:g}.")
        if not self.base:
            raise InfuseError("base needs at least one base model, such as minilm.")
        for method in self.chosen():
            if make(method).maker:
                raise InfuseError(f"{method!r} builds on trained adapters; compare methods that train on their own.")
            self.settings(method, self.seed).check()
        self.settings(self.chosen()[0], self.seed + self.seeds - 1).check()


def every_method() -> list[str]:
    """Methods and presets by name, then ``head`` and ``full``."""
    return unique([*(name for cls in registry().values() for name in (*cls.presets, cls.name)), "head", "full"])


def unique(names: Sequence[str]) -> list[str]:
    """The names without those that mean the same method as an earlier one."""
    first: dict[Method, str] = {}
    for name in names:
        first.setdefault(make(name), name)
    return list(first.values())
