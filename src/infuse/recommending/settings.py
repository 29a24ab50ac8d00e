"""The settings of a recommendation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infuse import units
from infuse.comparing.settings import every_method
from infuse.errors import InfuseError
from infuse.method import make
from infuse.precision import Precision
from infuse.settings import FromFile, check_kinds
from infuse.training.config import TrainConfig
from infuse.training.settings import Settings

Ability = Literal["merge", "mix", "fuse"]


@dataclass
class RecommendConfig(FromFile):
    """Find a method and its settings for your constraints: exact arithmetic first, then a short race on your data."""

    data: str | None = None
    """A CSV, TSV, JSONL or Parquet file, a folder of splits, a hub data set, banking77, or sample (bundled). Without
    it, the answer comes from arithmetic alone, and no weights are loaded."""
    base: str = "minilm"
    """The base model: minilm, a folder, or a hub name such as roberta-base."""
    max_params: str | None = None
    """Most parameters to train in the transformer, the head not counted: 50k, 200000, or a share of the base, 0.05%."""
    max_memory: str | None = None
    """Most memory for all tensors, weights included, in training and in serving --tasks adapters: 600MB, 16GiB. What
    Python and its libraries take comes on top (the answer says how much)."""
    max_latency: str | None = None
    """Longest call with one row on this machine: 20ms; merged, if the method merges and need not mix. Needs --data."""
    must: tuple[Ability, ...] = ()
    """What the adapter has to allow. merge: fold into the base; mix: a batch whose rows use different adapters; fuse:
    AdapterFusion over several."""
    tasks: int = 1
    """How many tasks over this base: files and memory of serving are counted for so many adapters."""
    time: str = "5m"
    """Time for the whole command, loading included: 30s, 5m, 1h."""
    methods: tuple[str, ...] = ()
    """Methods to choose from, e.g. ia3 lora; all by default."""
    labels: int = 10
    """How many labels the head has, where no data says it."""
    out: Path | None = None
    """The folder for the answer; by default runs/recommend-DATA. A recommendation that is there is replaced."""
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
    epochs: int = Settings.epochs
    """Passes over the rows in every run of the race, and in the training that is recommended."""
    batch_size: int = Settings.batch_size
    """Rows per optimizer step."""
    max_length: int = Settings.max_length
    """Tokens per text; longer texts are cut. Without data, all texts are taken to be so long."""
    precision: Precision = "auto"
    """Number format of the frozen trunk; auto takes bf16 where it is faster."""
    seed: int = 0
    """Seed of the race and of the validation split."""

    def __post_init__(self) -> None:
        for name in ("max_params", "max_memory", "max_latency", "time"):
            if type(value := getattr(self, name)) in (int, float):  # YAML reads 200000 as a number
                setattr(self, name, str(value))

    def check(self) -> None:
        """Raise :class:`InfuseError` for a value that cannot work."""
        check_kinds(self)
        for name, low, high in (("tasks", 1, 1_000_000), ("labels", 2, 1_000_000)):
            if not low <= getattr(self, name) <= high:
                raise InfuseError(f"{name} must lie between {low} and {high:,}, not {getattr(self, name)}.")
        alone = {make(name).name for name in every_method()}
        for method in map(make, self.methods):
            if method.unfreezes or method.name not in alone:
                raise InfuseError(f"{method.name} can't be recommended: it is no adapter that trains on its own.")
        _ = self.seconds, self.memory, self.latency, self.parameters(10**9)
        self.settings().check()
        if self.latency is not None and self.data is None:
            raise InfuseError("max_latency is measured on texts with the weights loaded: add --data, or leave it out.")

    @property
    def seconds(self) -> float:
        """The time budget."""
        return units.seconds(self.time)

    @property
    def memory(self) -> float | None:
        """The limit of memory, in bytes."""
        return None if self.max_memory is None else units.size(self.max_memory)

    @property
    def latency(self) -> float | None:
        """The limit of latency, in milliseconds."""
        return None if self.max_latency is None else units.milliseconds(self.max_latency)

    def parameters(self, base: int) -> float | None:
        """The limit of trained parameters on a base of so many."""
        return None if self.max_params is None else units.count(self.max_params, base)

    def folder(self) -> Path:
        about = Path(self.data).stem if self.data else Path(self.base).name
        return self.out or Path("runs") / f"recommend-{about.replace('/', '-')}"

    def settings(self, **chosen: Any) -> Settings:
        """How one run of the race is trained; nothing stops early, all have the same budget."""
        return Settings(**self._shared(), patience=0, **chosen)

    def to_train(self, **chosen: Any) -> TrainConfig:
        """The configuration of ``infuse train`` on the same data."""
        same = ("validation", "text", "label", "multi", "validation_fraction", "base")
        own = {name: getattr(self, name) for name in same}
        return TrainConfig(**self._shared(), **own, **({"data": self.data} if self.data else {}), **chosen)

    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("epochs", "batch_size", "max_length", "precision", "seed")}
