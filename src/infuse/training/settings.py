"""The settings of a training run that do not depend on its data."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from infuse.errors import InfuseError
from infuse.method import make
from infuse.precision import Precision, dtype_of, name_of
from infuse.settings import check_kinds
from infuse.spaces import Choice, Log, Space


@dataclass
class Settings:
    """How one adapter is trained."""

    method: str = "ia3"
    """The method and its settings: ia3, lora, lora:rank=4,alpha=8, …; or the baselines head and full."""
    layers: str = "all"
    """Which layers to adapt: all, last:2, first:2, or indices such as 0,3."""
    head: Literal["cosine", "linear", "hf"] = "cosine"
    """cosine: started at the class centroids; linear: started at zero; hf: the transformers model's own."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """How token vectors become one vector; auto: what the base says, else by its architecture."""
    epochs: int = 4
    """Passes over the training rows; the best one on validation is kept."""
    batch_size: int = 32
    """Rows per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate; by default the method's own."""
    head_learning_rate: float | None = None
    """Peak learning rate of the head; by default the head's own."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after warm-up."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""
    class_weights: bool = False
    """Weigh labels by the inverse of their frequency."""
    patience: int = 3
    """Stop after so many epochs without a better macro-F1 on validation; 0 never stops early."""
    trunk_dropout: bool = False
    """Keep the base model's dropout on while training (full fine-tuning always does)."""
    precision: Precision = "auto"
    """Number format of the frozen trunk; auto takes bf16 where it is faster. Adapter and head stay in fp32."""
    compile: bool = False
    """Compile the model before training: steps up to 20 % faster (with AMX; else 4) after a minute, for long runs."""
    max_tokens: int = 16_384
    """Tokens, padding included, that run at once; a batch with more runs in parts, for the same gradient."""
    max_length: int = 128
    """Tokens per text; longer texts are cut."""
    seed: int = 0
    """Seed of the parameters, the order of the rows, and the validation split."""

    @property
    def trunk_precision(self) -> str:
        """The number format of the trunk here, of :data:`infuse.precision.DTYPES`: fp32 where all of it is trained."""
        return "fp32" if make(self.method).unfreezes else name_of(dtype_of(self.precision))

    def check(self) -> None:
        """Raise :class:`InfuseError` for a value that cannot work."""
        if not isinstance(self.layers, str):
            raise InfuseError(f"layers must be a string such as 'all', 'last:2' or '0,3', not {self.layers!r}.")
        check_kinds(self)
        for name, low, high in (
            ("epochs", 1, 10_000),
            ("batch_size", 1, 100_000),
            ("max_length", 4, 1_000_000),
            ("max_tokens", 4, 1_000_000_000),
            ("warmup", 0, 1),
            ("label_smoothing", 0, 0.999),
            ("patience", 0, 10_000),
            ("clip", 0, float("inf")),
            ("weight_decay", 0, 10),
            ("seed", 0, 2**32 - 1),  # numpy's limit
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InfuseError(f"{name} must lie between {low} and {high:,}, not {value}.")
        for name in ("learning_rate", "head_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 10:
                raise InfuseError(f"{name} must be positive and at most 10, not {rate}.")


SPACE: Space = MappingProxyType(
    {
        "epochs": Choice(2, 4, 8),
        "batch_size": Choice(16, 32, 64),
        "head_learning_rate": Log(3e-4, 3e-2),
        "schedule": Choice("linear", "cosine", "constant"),
        "label_smoothing": Choice(0.0, 0.05, 0.1),
        "layers": Choice("all", "last:4", "last:2"),
        "trunk_dropout": Choice(False, True),
    }
)
"""Where `infuse tune` searches the settings that all methods have; a method's own are in its file."""
