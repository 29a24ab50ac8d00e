"""Saved runs as members of a fusion, and what the fusion attends to."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infuse.adapter import Adapter
from infuse.bases import BaseModel
from infuse.calls import mixing_weights
from infuse.checkpoint import header, load
from infuse.data import Rows
from infuse.errors import InfuseError
from infuse.model import check_name, route
from infuse.report import Drawn
from infuse.texts import batches, pad, tokenize, trunk
from infuse.training.folders import ADAPTER, AVERAGE, saved_adapter, write_csv
from infuse.training.plots import heat_map

ATTENTION = {"fusion_layers": "What the fusion attends to, by layer", "fusion_classes": "What it attends to, by label"}
"""Tables of a fusion's weights, and what they show."""


def load_members(model: nn.Module, runs: Sequence[Path]) -> list[str]:
    """Attach the adapters of run folders under the names that :func:`member_names` gives them."""
    folders = [saved_adapter(run) for run in runs]
    for folder in folders:
        header(folder)
    names = member_names(folders)
    for name, folder in zip(names, folders, strict=True):
        load(model, folder, name=name)
    return names


def member_names(folders: Sequence[Path]) -> list[str]:
    """A name per adapter: its run folder's, if need be with the folder above; if even so two are alike, a number.

    None is a name that the run gives to what it makes itself, or that can't name an adapter.
    """
    runs = [run.parent if run.name == ADAPTER else run for run in (folder.resolve() for folder in folders)]
    parts = [[re.sub(r"[^\w-]", "-", part) for part in run.parts] for run in runs]
    for depth in (1, 2):
        names = ["-".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names) and all(map(_free, names)):
            return names
    return [f"{own[-1]}-{i + 1}" for i, own in enumerate(parts)]


def _free(name: str) -> bool:
    try:
        return check_name(name) not in (ADAPTER, AVERAGE)
    except InfuseError:
        return False


@torch.inference_mode()
def attention(
    base: BaseModel, adapter: Adapter, rows: Rows, max_length: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mean weights of a fusion's members: site → (members,), and (texts, members) averaged over sites."""
    tokens = tokenize(base.tokenizer, rows.texts, max_length)
    per_site = {name: np.zeros(len(adapter.members)) for name in adapter.sites}
    per_text = np.zeros((len(rows), len(adapter.members)))
    for index in batches(tokens):
        batch = pad([tokens[i] for i in index], base.pad_id, next(base.model.parameters()).device)
        with mixing_weights() as seen, route(base.model, adapter.name):
            trunk(base.model)(**batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        for site, calls in seen.items():
            mean = ((calls[-1] * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
            per_site[site] += mean.sum(0) / len(rows)
            per_text[index] += mean / len(seen)
    return per_site, per_text


def write_attention(base: BaseModel, adapter: Adapter, rows: Rows, max_length: int, folder: Path) -> dict[str, Drawn]:
    """Write the tables of :data:`ATTENTION` as CSV; the heat map of each."""
    per_site, per_text = attention(base, adapter, rows, max_length)
    sets = rows.label_sets()
    labels = rows.label_set
    per_class = {c: per_text[[i for i, own in enumerate(sets) if c in own]].mean(0) for c in labels}
    figures = {}
    for (name, title), table in zip(ATTENTION.items(), (per_site, per_class), strict=True):
        written = [{"": row, **dict(zip(adapter.members, map(float, w), strict=True))} for row, w in table.items()]
        write_csv(folder / f"{name}.csv", written)
        figures[name] = Drawn(title, partial(heat_map, np.stack(list(table.values())), list(table), adapter.members))
    return figures
