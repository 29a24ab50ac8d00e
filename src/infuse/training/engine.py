"""The pieces that transformers' Trainer works with: model, trainer, checkpoints of what is trained."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infuse import storage
from infuse.adapter import Adapter
from infuse.errors import InfuseError
from infuse.formats.bundle import to_bytes
from infuse.heads import HEADS, Head, apply
from infuse.model import penalty, store_of
from infuse.training.batches import Buckets
from infuse.training.prefix import Prefix
from infuse.training.settings import Settings

WEIGHTS, STATE = "trained.safetensors", "trainer_state.json"


class TextClassifier(nn.Module):
    """An adapted model under its adapter's head, with the loss that Trainer expects.

    The frozen trunk runs in eval mode unless ``trunk_dropout``: dropout in layers that do not learn only adds noise.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        settings: Settings,
        weights: Tensor | None = None,
        prefix: Prefix | None = None,
    ):
        super().__init__()
        self.model = model
        self.store = [store_of(model)]  # in a list, lest it be registered twice
        self.adapter = self.store[0][name]
        assert isinstance(self.adapter.head, Head)
        self.head = [self.adapter.head]
        self.whole = settings.trunk_dropout or self.adapter.method.unfreezes
        self.smoothing = settings.label_smoothing
        self.prefix = [prefix]
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        hidden: Tensor | None = None,
        share: float = 1.0,
    ) -> dict[str, Tensor]:
        prefix = self.prefix[0]
        with prefix.replaced(hidden) if prefix and hidden is not None else nullcontext():
            out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        head = self.head[0]
        logits = apply(head, out, attention_mask)
        if labels is None:
            return {"logits": logits}
        loss = head.loss(logits, labels, self.class_weights, self.smoothing)
        return {"loss": share * (loss + penalty(self.model, self.adapter.name)), "logits": logits}

    def train(self, mode: bool = True) -> "TextClassifier":
        self.training = mode
        self.model.train(mode and self.whole)
        self.store[0].train(mode)
        return self


class AdapterTrainer(Trainer):
    """Trainer that buckets by length, gives the head its own learning rate, and checkpoints only what is trained."""

    def __init__(self, *, settings: Settings, **kwargs: Any):
        super().__init__(**kwargs)
        self.settings = settings

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        dataset: Any = train_dataset or self.train_dataset
        return Buckets(dataset.tokens, self.settings.batch_size, self.settings.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings)  # type: ignore[arg-type]  # a TextClassifier
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        whole: Any = self.model.class_weights  # type: ignore[union-attr]  # a TextClassifier
        steps = [
            super(AdapterTrainer, self).training_step(model, part | {"share": share}, num_items_in_batch)
            for part, share in parts(inputs, self.settings.max_tokens, whole)
        ]
        return torch.stack(steps).sum()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(folder / WEIGHTS, to_bytes(dict(trained(self.model))))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with storage.reported(Path(str(self.args.output_dir))):  # torch writes the optimizer's state in C++
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained(self.model):
                parameter.copy_(state[name])

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint)).name
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / best))

    def go_on(self, checkpoint: Path) -> None:
        """Resume from a state; if training had come to its end there, take the best state without further steps."""
        self._load_from_checkpoint(str(checkpoint))
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        callbacks: Any = state.stateful_callbacks
        if not callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self.state = state
        if state.best_model_checkpoint:
            self._load_best_model()


def parts(
    batch: dict[str, Tensor], max_tokens: int, class_weights: Tensor | None = None
) -> list[tuple[dict[str, Tensor], float]]:
    """A batch in parts of at most ``max_tokens`` tokens (but at least one row), and each part's share of the loss."""
    rows, length = batch["input_ids"].shape
    size = max(1, max_tokens // length)
    if size >= rows:
        return [(batch, 1.0)]
    cut = [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, rows, size)]
    mass = [len(part["labels"]) for part in cut]
    if class_weights is not None and batch["labels"].dim() == 1:  # the loss is a weighted mean
        mass = [class_weights.to(part["labels"].device)[part["labels"]].sum().item() for part in cut]
    for part in cut:
        longest = int(part["attention_mask"].sum(1).max())
        part |= {name: value[:, :longest] for name, value in part.items() if name != "labels"}
    return [(part, each / sum(mass)) for part, each in zip(cut, mass, strict=True)]


class NaNGuard(TrainerCallback):
    """Stops a run whose loss is no longer a number, with advice."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        for key in ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise InfuseError(
                    f"The {'loss' if key == 'loss' else 'gradient'} became {value} at step {state.global_step}: "
                    "lower --learning-rate (a tenth of it is a good next try) or raise --warmup; nothing was saved."
                )


def trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that gets gradients."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def head_rate(adapter: Adapter) -> float:
    """The learning rate of an adapter's head by default; a model's own that is one layer learns as a linear one."""
    assert isinstance(adapter.head, Head)
    kind, layers = adapter.head.kind, list(adapter.copies.values())
    alone = kind == "hf" and len(layers) == 1 and isinstance(layers[0], nn.Linear)
    return HEADS["linear" if alone else kind]


def parameter_groups(model: TextClassifier, settings: Settings) -> list[dict[str, Any]]:
    """Deltas and head at their learning rates; weight decay on matrices only, and not on those of ``undecayed``."""
    head = {id(p) for m in (model.adapter.head, model.adapter.copies) if m is not None for p in m.parameters()}
    spared = {id(d.params[n]) for d in model.adapter.deltas.values() for n in d.method.undecayed}  # type: ignore[union-attr, operator]  # deltas
    rate = settings.learning_rate or model.adapter.method.rate
    rates = {False: rate, True: settings.head_learning_rate or head_rate(model.adapter)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for _, parameter in trained(model):
        decayed = parameter.dim() > 1 and id(parameter) not in spared
        groups.setdefault((id(parameter) in head, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[is_head], "weight_decay": settings.weight_decay if decayed else 0.0}
        for (is_head, decayed), parameters in groups.items()
    ]
