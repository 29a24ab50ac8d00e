"""Train one adapter on labelled rows."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from infuse import storage
from infuse.adapter import Adapter
from infuse.bases import BaseModel
from infuse.data import Rows
from infuse.errors import InfuseError, listed
from infuse.heads import Head
from infuse.method import make
from infuse.model import attach, fuse
from infuse.texts import bare_features
from infuse.training.batches import Collate, encode, one_hot
from infuse.training.engine import STATE, WEIGHTS, AdapterTrainer, NaNGuard, TextClassifier
from infuse.training.metrics import decide, overall
from infuse.training.prefix import prefix_of, remember
from infuse.training.settings import Settings


@dataclass
class Fitted:
    """What :func:`fit` leaves: the adapter (attached and active), and the course of its training."""

    adapter: Adapter
    labels: tuple[str, ...]
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per logged step or evaluation, as Trainer logs them: epoch, step, loss, eval_accuracy, …"""
    resumed: bool = False


def fit(
    base: BaseModel,
    train: Rows,
    validation: Rows | None,
    settings: Settings,
    *,
    name: str = "default",
    checkpoints: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    members: Sequence[str] = (),
) -> Fitted:
    """Attach an adapter with a head to ``base`` and train both; the best epoch on validation is kept.

    Args:
        base: the loaded base; it stays as it is, except under ``method: full``.
        train, validation: the rows; without validation the last state is kept and nothing stops early.
        settings: how to train.
        name: the adapter's name.
        checkpoints: a folder for the state after every epoch; if it holds states of an interrupted run, training goes
            on from the newest whole one and ends with the same weights as an uninterrupted run.
        callbacks: more callbacks of Trainer, for progress.
        members: for a mixer, the names of the attached adapters that it mixes.
    Raises:
        InfuseError: settings that cannot work, labels in validation that training lacks, a loss that is not finite.
    """
    settings.check()
    labels = train.label_set
    if len(labels) < 2:
        raise InfuseError(f"Training needs at least two labels, but the rows have {listed(labels)}.")
    set_seed(settings.seed)
    method = make(settings.method)
    if members:
        adapter = fuse(base.model, members, method, name, layers=settings.layers)
    else:
        adapter = attach(base.model, method, name, layers=settings.layers)
    adapter.head = Head(settings.head, labels, base.width, base.pooling, train.multi)
    adapter.head.to(next(base.model.parameters()).device)
    encoded = encode(base, train, labels, settings.max_length)
    held_out = None if validation is None else encode(base, validation, labels, settings.max_length).sorted()
    if settings.head != "hf":
        adapter.head.start_at(bare_features(base, encoded.tokens), one_hot(encoded.targets, len(labels)))
    weights = class_weights(encoded.targets, len(labels)) if settings.class_weights else None
    prefix = None if settings.trunk_dropout else prefix_of(base, adapter)
    if prefix is not None:
        for rows in filter(None, (encoded, held_out)):
            rows.remembered = remember(base, prefix, rows.tokens)
    model = TextClassifier(base.model, name, settings, weights, prefix)

    if method.unfreezes:
        base.remembered.clear()
    with _folder(checkpoints) as folder, _compiled(base) if settings.compile else nullcontext():
        trainer = AdapterTrainer(
            settings=settings,
            model=model,
            args=_arguments(settings, folder, len(encoded), held_out is not None),
            train_dataset=encoded,
            eval_dataset=held_out,
            data_collator=Collate(base.pad_id),
            compute_metrics=lambda out: overall(out.label_ids, _decided(out.predictions, train.multi)),
            callbacks=[NaNGuard(), *_early_stopping(settings, held_out is not None), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # our progress replaces it
        newest = newest_checkpoint(folder)
        if newest is None:
            trainer.train()
        else:
            trainer.go_on(newest)
        model.eval()
        base.model.eval()
        return Fitted(adapter, tuple(labels), list(trainer.state.log_history), newest is not None)


def class_weights(targets: Tensor, count: int) -> Tensor:
    """Inverse frequencies: mean 1 over the rows (single-label), or negatives per positive (multi-label)."""
    frequency = one_hot(targets, count).sum(0).clamp(min=1)
    if targets.dim() == 2:
        return ((len(targets) - frequency) / frequency).clamp(1, 100)
    return len(targets) / (count * frequency)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole state in a folder."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
    return next(filter(_whole, newest_first), None)


def _whole(checkpoint: Path) -> bool:
    try:
        load_file(checkpoint / WEIGHTS)
        archives = [zipfile.ZipFile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
        return not any(archive.testzip() for archive in archives) and bool(json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


@contextmanager
def _folder(checkpoints: Path | None):
    if checkpoints is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        yield checkpoints
        return
    with storage.scratch() as folder:
        yield folder


@contextmanager
def _compiled(base: BaseModel) -> Iterator[None]:
    from torch._inductor.cpp_builder import get_cpp_compiler  # here, because it takes seconds to import
    from torch._inductor.exc import InvalidCxxCompiler

    model: Any = base.model
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InfuseError(
            "compile needs a C++ compiler, and there is none: install g++ or leave compile out."
        ) from None
    model.compile(dynamic=True)
    try:
        yield
    finally:
        model._compiled_call_impl = None


def _arguments(settings: Settings, folder: Path, rows: int, evaluates: bool) -> TrainingArguments:
    logging.set_verbosity_error()
    steps = max(1, -(-rows // settings.batch_size))
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=4 * settings.batch_size,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=int(settings.warmup * steps * settings.epochs),
        max_grad_norm=settings.clip,
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        restore_callback_states_from_checkpoint=True,  # or patience would count from zero again
        metric_for_best_model="macro_f1",
        greater_is_better=True,
        logging_steps=max(1, steps // 10),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _early_stopping(settings: Settings, evaluates: bool) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(settings.patience)] if evaluates and settings.patience else []


def _decided(logits: np.ndarray, multi: bool) -> np.ndarray:
    return decide(1 / (1 + np.exp(-logits)) if multi else logits, multi)
